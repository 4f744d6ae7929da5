"""The module that trains: batches in, sums over supervised tokens, divided once a step.

Shapes in names: B rows, T tokens a row, N supervised tokens, C channels.

**Normalisation.** ``training_step`` returns a sum, gradients add up over micro-batches, and right before the optimizer
they are divided by the supervised tokens of the whole step, over all micro-batches and ranks. So 1 x 8 rows equal
8 x 1, and a token weighs the same wherever it lies. The count stays on the device: nothing in a step waits for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Linear, ModuleList
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from datamodules.batch import IGNORE_INDEX, Batch
from datamodules.errors import UserError
from datamodules.findings import FindingsDataModule
from lightning_modules.hyperparameters import INSTANTIATOR, to_plain
from lightning_modules.losses.objectives import Objective
from lightning_modules.losses.teacher import Teacher, build_teacher, widths
from lightning_modules.losses.teacher_cache import CachedTeacher, targets_of
from lightning_modules.losses.teacher_shards import Targets
from lightning_modules.models.backbone import Backbone, out_of_memory_advice
from lightning_modules.models.backend import Backend, backend_of, check_sharding, gather_positions
from lightning_modules.models.decoder import Predictions
from lightning_modules.models.fused_decoder import FusedDecoder, build_decoder


class CausalLMModule(LightningModule):
    """Fine-tunes a causal language model on :class:`datamodules.batch.Batch`, whatever loader yields it.

    Logged each step: ``train/loss``, ``train/token_accuracy``, ``train/grad_norm`` (before clipping), ``lr``, and the
    objective's parts (``train/kl``). Each validation or test: ``val/loss``, ``val/token_accuracy``, over the whole set.

    Args:
        backbone: the model and what of it is trained.
        objective: what is minimised.
        optimizer: makes the optimizer from parameter groups; a class path with arguments in a config,
            ``functools.partial(torch.optim.AdamW, lr=1e-4)`` in Python.
        lr_scheduler: makes the schedule from the optimizer and the run's number of steps; null for a constant rate.

    Attributes:
        model: the PEFT (or transformers) model; None until :meth:`configure_model`.
        projections: of hidden states to a teacher's width, one a matched layer; None where there is nothing to learn.
        step_metrics: the last optimizer step's logged values, as tensors on the device.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: Callable[[Iterable], Optimizer],  # type: ignore[type-arg]
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._not_stored: list[str] = []  # arguments that are no plain data
        if "_instantiator" not in self.hparams:  # not made by the CLI, which stores plain data itself
            self._store_arguments(dict(self.hparams))
        self.backbone = backbone
        self.objective = objective
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.strict_loading = False  # checkpoints lack the frozen base; load_state_dict checks the rest
        self.model: Any = None
        self.projections: ModuleList | None = None
        self.step_metrics: dict[str, Tensor] = {}
        self.decoder: Any = None  # a view of the model, plain or fast
        self._teacher: Teacher | None = None  # no nn.Module, so that it is in no state_dict, parameters() or train()
        self._cached: CachedTeacher | None = None
        self._pending: dict[str, Tensor] = {}  # sums of the micro-batches since the last optimizer step
        self._evaluated: dict[str, Tensor] = {}  # sums of the validation or test so far

    # ------------------------------------------------------------------ the network

    def configure_model(self) -> None:
        """Builds the network, once: on the trainer's device, or without a trainer on torch's default device."""
        if self.model is None:
            trainer = self._trainer
            device = trainer.strategy.root_device if trainer is not None else torch.get_default_device()
            recipe, backend = self.backbone, self._backend
            if trainer is not None:
                check_sharding(trainer.strategy, recipe.quantization)
            backend.check(recipe.quantization, teacher=self.objective.teacher_backbone is not None)
            self.model = backend.build(recipe, device)
            self.model.train(self.training)
            self.decoder, why = build_decoder(
                self.model, recipe.kernels, recipe.activation_checkpointing, torch.device(device), recipe.fp8,
                backend.fused_unsupported_reason,
            )  # fmt: skip
            rank_zero_info(why)
            # every rank loads the same base: DDP need not broadcast gigabytes at the start, and buffers at each step
            # (which would hang ranks that have unequal numbers of validation rows)
            same = [
                *(n for n, p in self.named_parameters() if not p.requires_grad),
                *(n for n, _ in self.named_buffers()),
            ]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, same)
        if self.projections is None:
            self.projections = self._make_projections()

    def _make_projections(self) -> ModuleList | None:
        recipe, layers = self.objective.teacher_backbone, self.objective.layers
        if recipe is None or not layers or self._trainer is None:  # nobody trains: the teacher need not be here
            return None
        own, theirs = widths(self.backbone, recipe)
        if own == theirs:
            return None
        device = self._trainer.strategy.root_device
        made = [Linear(own, theirs, bias=False, dtype=torch.float32, device=device) for _ in layers]
        for project in made:
            torch.nn.init.eye_(project.weight)
        return ModuleList(made)

    def to(self, *args: Any, **kwargs: Any) -> CausalLMModule:
        """Moves to a device; a type is ignored, since the backbone chose it.

        ``trainer.precision: bf16-true`` would otherwise round the adapter's float32 weights. ``.double()`` and the like
        convert.
        """
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        return self if device is None else super().to(device)

    def setup(self, stage: str) -> None:
        """Has the data module join a cached teacher's targets to the rows."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, FindingsDataModule):
            self._cached = data.extras = self.objective.cached_teacher(data, self.backbone)
            if self._cached is not None and stage == "fit" and self.trainer.max_steps > 0:
                batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches * self.trainer.world_size
                self._cached.check_length(batches * data.batch_size)

    def on_fit_start(self) -> None:
        """Builds the teacher before the first step, and forgets the sums of an interrupted one."""
        self._pending = {}
        self._prepare_teacher()

    def forward(self, batch: Batch) -> Tensor:
        """Computes the last hidden states [B, T, C]."""
        return self.decoder.hidden_states(batch)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Plans the fast path's attention while the segments are still on the host, then copies."""
        if isinstance(self.decoder, FusedDecoder) and batch.segment_ids_BT.device.type == "cpu":
            batch = replace(batch, plan=self.decoder.plan(batch.segment_ids_BT))
        return batch.to(device)

    def _prepare_teacher(self) -> Teacher | None:
        recipe = self.objective.teacher_backbone
        if recipe is not None and self._teacher is None:
            if recipe != "base":
                self._backend.check(recipe.quantization)
            device = self._backend.build_device(self.device)
            self._teacher = build_teacher(recipe, self.backbone, self.model, device, self.decoder)
            self._backend.place(self._teacher.model)
        return self._teacher

    @property
    def _backend(self) -> Backend:
        return backend_of(self._trainer)

    # ------------------------------------------------------------------ one step for training, validation and test

    def compute_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the objective's sums over a batch, and ``count``, the tokens they are over."""
        rows, tokens = batch.labels_BT.shape
        with out_of_memory_advice(f"data.init_args.sequence_length {tokens} or batch_size {rows}"):
            positions_N = self._backend.positions(batch)
            labels_N = gather_positions(batch.labels_BT.flatten(), positions_N)
            teacher = self._prepare_teacher()
            if teacher is not None:
                theirs = list(self.objective.layers.values())
                predictions: Predictions | Targets | None = teacher.predict(batch, positions_N, theirs)
            else:
                predictions = targets_of(batch, labels_N, self._cached.vocabulary if self._cached else None)
            sums = self.objective(self._predict(batch, positions_N), labels_N, predictions)
        return {**sums, "count": (labels_N != IGNORE_INDEX).sum().to(sums["loss"].dtype)}

    def _predict(self, batch: Batch, positions_N: Tensor | None) -> Predictions:
        """The student's hidden states at supervised positions, and those that an objective compares, projected."""
        decoder, layers = self.decoder, list(self.objective.layers)
        if not layers:
            hidden_NC = decoder.hidden_states_at(batch, positions_N)
            return Predictions(hidden_NC, decoder.head, decoder.frozen_head, backend=self._backend)
        hidden_NC, states = decoder.hidden_states_of_layers(batch, positions_N, layers)
        states = [state.to(torch.promote_types(state.dtype, torch.float32)) for state in states]
        if self.projections is not None:
            states = [project(state) for project, state in zip(self.projections, states, strict=True)]
        return Predictions(hidden_NC, decoder.head, decoder.frozen_head, states, self._backend)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the sum of the loss, times what Lightning will divide it by."""
        sums = self.compute_sums(batch)
        _add(self._pending, sums)
        return sums["loss"] * self.trainer.accumulate_grad_batches

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's backward pass, with advice where memory ends."""
        with out_of_memory_advice():
            super().backward(loss, *args, **kwargs)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Divides the gradients by the step's supervised tokens, then clips them; Lightning calls it before each step.

        One norm and one multiplication do both: the strategy has averaged over ranks, so gradients are multiplied by
        ``ranks / tokens``, and by ``clip / norm`` where the norm of the result is above ``clip``.
        """
        totals, self._pending = self._totals(self._pending), {}
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scale = self.trainer.world_size / totals["count"].clamp(min=1)
        norm = self._backend.total_norm(gradients) * scale
        gradients = self._backend.local(gradients)
        if gradient_clip_val and gradient_clip_algorithm != "value":
            scale = scale * (gradient_clip_val / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, scale)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch._foreach_clamp_min_(gradients, -gradient_clip_val)
            torch._foreach_clamp_max_(gradients, gradient_clip_val)
        # a tensor on the host for the rate: self.log would copy a number to the device and wait
        rate = torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float32)
        self.step_metrics = {**_means(totals, "train"), "train/grad_norm": norm.detach(), "lr": rate}
        self.log_dict(self.step_metrics, on_step=True, on_epoch=False, batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the validation's sums."""
        _add(self._evaluated, self.compute_sums(batch))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the test's sums."""
        _add(self._evaluated, self.compute_sums(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs means over the whole validation set."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Logs means over the whole test set."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        sums, self._evaluated = self._evaluated or self._no_sums(), {}
        # the values are the same on all ranks already; sync_dist only keeps Lightning from warning
        self.log_dict(_means(self._totals(sums), stage), batch_size=1, sync_dist=True)

    def _no_sums(self) -> dict[str, Tensor]:
        """Zeros under the objective's names, for a rank that had no batch."""
        width = self.model.get_output_embeddings().weight.shape[1]
        decoder = self.decoder
        nothing = Predictions(torch.zeros(0, width, dtype=decoder.dtype, device=self.device), decoder.head)
        labels_N = torch.zeros(0, dtype=torch.long, device=self.device)
        with torch.no_grad():
            sums = self.objective(nothing, labels_N, nothing)
        return {**sums, "count": torch.zeros_like(sums["loss"])}

    def _totals(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adds sums up over ranks, in one collective."""
        values = torch.stack(list(sums.values()))
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(values)  # Lightning's reduce would put a barrier, and a wait, before it
        return dict(zip(sums, values.unbind(), strict=True))

    # ------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> Any:
        """Makes the optimizer (matrices decay, vectors do not, frozen weights are left out) and its schedule.

        Raises:
            UserError: nothing is trainable, or a schedule is asked for and the run has no end.
        """
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not trainable:
            raise UserError(
                f"backbone.lora null: nothing is trainable with backbone.quantization {self.backbone.quantization}; "
                "set backbone.lora (rank 16, alpha 32)"
            )
        trainable += self.projections.parameters() if self.projections is not None else []
        matrices = [p for p in trainable if p.ndim >= 2]
        vectors = [p for p in trainable if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = self.optimizer([group for group in groups if group["params"]])
        if self.lr_scheduler is None:
            return optimizer
        schedule = self.lr_scheduler(optimizer, self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _total_steps(self) -> int:
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else self.trainer.estimated_stepping_batches
        if math.isinf(steps) or steps < 1:
            raise UserError(
                f"trainer.max_steps {self.trainer.max_steps}: the schedule needs the run's length and the data are "
                "streamed; set trainer.max_steps, or model.init_args.lr_scheduler null"
            )
        return int(steps)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves trainable tensors only: megabytes, not the base."""
        names = self._trainable_names()
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in names}
        if self._not_stored:
            missing = ", ".join(self._not_stored)
            warnings.warn(f"the checkpoint does not hold {missing}: pass it to load_from_checkpoint", stacklevel=2)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the stored arguments where the module is rebuilt from them, so that it stores them again."""
        if self._trainer is None:
            self._store_arguments(checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what :meth:`on_save_checkpoint` left; every trainable tensor must be there, and nothing unknown.

        Raises:
            UserError: the checkpoint was made with another backbone or other adapters.
        """
        if self.projections is None:  # to a teacher's width: nothing but training needs them
            state_dict = {name: t for name, t in state_dict.items() if not name.startswith("projections.")}
        way_out = "it was made with another backbone; give the backbone of its run (config.yaml beside it)"
        try:
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # shapes
            raise UserError(f"checkpoint does not fit: {way_out} ({' '.join(str(error).split())[:300]})") from error
        missing = sorted(self._trainable_names() & set(result.missing_keys))
        for names, what in ((missing, "lacks"), (result.unexpected_keys, "holds unknown")):
            if names:
                raise UserError(f"checkpoint {what} {len(names)} tensors, {names[0]} the first: {way_out}")
        result.missing_keys.clear()  # the frozen base; Lightning would print every name
        return result

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Rebuilds a module from its checkpoint alone; the base comes from where it was trained from.

        Args:
            checkpoint_path: file that a run left in ``checkpoints/``.
            map_location: device to build on, the CPU if None.
            **kwargs: constructor's arguments that replace the run's, and Lightning's own (``hparams_file``).
        """
        kwargs = {name: _plain_or_itself(value) for name, value in kwargs.items()}
        kwargs.setdefault("weights_only", True)
        device = map_location if isinstance(map_location, (str, torch.device)) else None
        with torch.device(device if device is not None else torch.get_default_device()):
            return super().load_from_checkpoint(checkpoint_path, map_location=map_location, **kwargs)

    def save_adapter(self, path: str | Path) -> None:
        """Writes the adapter as PEFT does, for ``PeftModel.from_pretrained``; without one, the whole model.

        Every rank of a trainer calls it, since each may hold a part; rank zero writes.

        Args:
            path: folder, made if need be.
        """
        writes = self._trainer is None or self._trainer.is_global_zero
        if not hasattr(self.model, "peft_config"):
            if writes:
                self.model.save_pretrained(path)
            return
        names = self._trainable_names()
        names = {name for name in names if name.startswith("model.")}
        tensors = {name.removeprefix("model."): t for name, t in self.state_dict().items() if name in names}
        tensors = self._backend.to_host(tensors)
        if writes:  # embeddings are never trained: "auto" would ask the hub for the base's config
            self.model.save_pretrained(path, state_dict=tensors, save_embedding_layers=False)

    def _trainable_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _store_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Keeps the constructor's arguments as plain data, as the CLI does; what can't be is left out."""
        plain: dict[str, Any] = {"_instantiator": INSTANTIATOR}
        self._not_stored = []
        for name, value in arguments.items():
            try:
                plain[name] = to_plain(value)
            except TypeError:
                self._not_stored.append(name)
        self.hparams.clear()
        self.save_hyperparameters(plain)


def _plain_or_itself(value: Any) -> Any:
    try:
        return to_plain(value)
    except TypeError:
        return value


def _add(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value.detach() if name in totals else value.detach()


def _means(totals: Mapping[str, Tensor], stage: str) -> dict[str, Tensor]:
    names = {"correct": "token_accuracy"}
    count = totals["count"].clamp(min=1)
    return {f"{stage}/{names.get(n, n)}": total / count for n, total in totals.items() if n != "count"}
