"""The training module: batches in, a loss over supervised tokens out.

Shapes in names: B rows, T tokens per row, N supervised tokens, C channels.

**Normalisation.** ``training_step`` returns a sum. Gradients add up over micro-batches, and directly before the
optimizer step they are divided by the supervised tokens of the whole step, over all micro-batches and ranks. So 1 x 8
rows equal 8 x 1, and a token has the same weight in every row. The count stays on the device: nothing in a step waits
for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import ModuleList
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from datamodules.batch import IGNORE_INDEX, Batch
from datamodules.findings import FindingsDataModule
from lightning_modules.allowed_classes import check_class_paths
from lightning_modules.ddp_sync import exclude_frozen_from_ddp
from lightning_modules.hyperparameters import (  # fmt: skip
    plain_arguments,
    plain_or_itself,
    read_arguments,
)
from lightning_modules.losses.objectives import Objective
from lightning_modules.losses.student import predict_student, zero_sums
from lightning_modules.losses.teacher import build_projections
from lightning_modules.losses.teacher_source import TeacherSource
from lightning_modules.models.backbone import Backbone, out_of_memory_advice
from lightning_modules.models.backend import Backend, backend_of, check_precision, check_sharding, gather_positions
from lightning_modules.models.fused_decoder import FusedDecoder, build_decoder
from lightning_modules.optimization import normalize_gradients, parameter_groups, total_steps, trainable_parameters
from lightning_modules.resumed_settings import ResumedSettings
from lightning_modules.token_sums import RunningSums, token_means
from lightning_modules.trainable_state import check_loaded_names, checked_loading, save_adapter, trainable_only


class CausalLMModule(LightningModule):
    """Fine-tunes a causal language model on :class:`datamodules.batch.Batch` objects from any loader.

    Logged at each step: ``train/loss``, ``train/token_accuracy``, ``train/grad_norm`` (before clipping), ``lr``, and
    the parts of the objective (``train/kl``). Logged at each validation or test: ``val/loss``, ``val/token_accuracy``,
    over the whole set.

    The trainer's precision must be 32-true: the types of weights and products are those of ``backbone``.

    Args:
        backbone: the model and the part of it that is trained.
        objective: the loss.
        optimizer: builds the optimizer from parameter groups: a class path with arguments in a config,
            ``functools.partial(torch.optim.AdamW, lr=1e-4)`` in Python.
        lr_scheduler: builds the schedule from optimizer and number of steps of the run; null for a constant rate.

    Attributes:
        model: the PEFT (or transformers) model; None until :meth:`configure_model`.
        decoder: view of the model, eager or fused, that computes hidden states; None until :meth:`configure_model`.
        projections: maps of hidden states to the teacher's width, one per matched layer; None without any.
        teacher_source: the teacher of the objective.
        step_sums: sums of the micro-batches since the last optimizer step.
        step_metrics: values logged at the last optimizer step, as tensors on the device.
        resumed: settings that differ from those of the checkpoint that the fit resumes from.
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
        self._missing_arguments: list[str] = []  # arguments that are not plain data
        if "_instantiator" not in self.hparams:  # built in Python: the CLI stores plain data itself
            self._store_arguments(dict(self.hparams))
        self.backbone = backbone
        self.objective = objective
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.strict_loading = False  # checkpoints lack the frozen base; load_state_dict checks all other tensors
        self.model: Any = None
        self.decoder: Any = None
        self.projections: ModuleList | None = None
        self.teacher_source = TeacherSource()
        self.step_sums, self.evaluation_sums = RunningSums(), RunningSums()
        self.step_metrics: dict[str, Tensor] = {}
        self.resumed = ResumedSettings()

    @property
    def attached_trainer(self) -> Trainer | None:
        """The trainer; None without one, where ``self.trainer`` raises."""
        return self._trainer  # Lightning has no public way to ask

    @property
    def _backend(self) -> Backend:
        return backend_of(self.attached_trainer)

    def setup(self, stage: str) -> None:
        """Validates the trainer's settings, and has the data module add a cached teacher's targets to the batches.

        Raises:
            UserError: the precision or the strategy is not supported, or the cache does not fit the run.
        """
        check_precision(self.trainer.precision_plugin, self.backbone.dtype)
        check_sharding(self.trainer.strategy, self.backbone.quantization)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, FindingsDataModule):
            steps = self.trainer.max_steps if stage == "fit" else 0
            batches = steps * self.trainer.accumulate_grad_batches * self.trainer.world_size
            self.teacher_source.open_cache(self.objective, data, self.backbone, batches)

    def configure_model(self) -> None:
        """Builds the network, once: on the trainer's device, or without a trainer on torch's default device."""
        trainer = self.attached_trainer
        device = trainer.strategy.root_device if trainer is not None else torch.get_default_device()
        if self.model is None:
            backbone, backend = self.backbone, self._backend
            backend.check(backbone.quantization, teacher=self.objective.teacher_backbone is not None)
            self.model = backend.build(backbone, device)
            self.model.train(self.training)
            self.decoder, reason = build_decoder(
                self.model, backbone.kernels, backbone.activation_checkpointing, torch.device(device), backbone.fp8,
                backend.fused_unsupported_reason,
            )  # fmt: skip
            rank_zero_info(reason)
            exclude_frozen_from_ddp(self)
        if self.projections is None and trainer is not None:  # only training needs them, or the teacher's config
            self.projections = build_projections(self.objective, self.backbone, device)

    def on_fit_start(self) -> None:
        """Builds the teacher before the first step, and discards the sums of an interrupted step."""
        self.step_sums.clear()
        self._build_teacher()

    def _build_teacher(self) -> None:
        source, backend = self.teacher_source, self._backend
        source.build(self.objective, self.backbone, self.model, self.decoder, backend, self.device)

    def forward(self, batch: Batch) -> Tensor:
        """Computes the last hidden states [B, T, C]."""
        return self.decoder.hidden_states(batch)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Plans the attention of the fused kernels while the segments are still on the host, then copies the batch."""
        if isinstance(self.decoder, FusedDecoder) and batch.segment_ids_BT.device.type == "cpu":
            batch = replace(batch, plan=self.decoder.plan(batch.segment_ids_BT))
        return batch.to(device)

    def compute_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the objective's sums over a batch, and ``count``, the number of supervised tokens."""
        rows, tokens = batch.labels_BT.shape
        with out_of_memory_advice(f"data.init_args.sequence_length {tokens} or batch_size {rows}"):
            positions_N = self._backend.positions(batch)
            labels_N = gather_positions(batch.labels_BT.flatten(), positions_N)
            self._build_teacher()
            layers = self.objective.layers
            teacher = self.teacher_source.predict(batch, positions_N, labels_N, list(layers.values()))
            student = predict_student(self.decoder, batch, positions_N, list(layers), self.projections, self._backend)
            sums = self.objective(student, labels_N, teacher)
        return {**sums, "count": (labels_N != IGNORE_INDEX).sum().to(sums["loss"].dtype)}

    def zero_sums(self) -> dict[str, Tensor]:
        """Returns zeros under the names of :meth:`compute_sums`, for a rank that had no batch."""
        return zero_sums(self.objective, self.model, self.decoder, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the sum of the loss, multiplied by the number that Lightning divides it by."""
        sums = self.compute_sums(batch)
        self.step_sums.add(sums)
        return sums["loss"] * self.trainer.accumulate_grad_batches

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs Lightning's backward pass, with advice if memory runs out."""
        with out_of_memory_advice():
            super().backward(loss, *args, **kwargs)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Divides the gradients by the step's supervised tokens, then clips them; Lightning calls it before each step.

        The strategy has averaged the gradients over ranks, so they are multiplied by ``ranks / tokens``.
        """
        totals = self.step_sums.reduce(self.trainer.world_size)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scale = self.trainer.world_size / totals["count"].clamp(min=1)
        norm = normalize_gradients(gradients, scale, self._backend, gradient_clip_val, gradient_clip_algorithm)
        # the rate as a tensor on the host: self.log would copy a number to the device and wait
        rate = torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float32)
        self.step_metrics = {**token_means(totals, "train"), "train/grad_norm": norm.detach(), "lr": rate}
        self.log_dict(self.step_metrics, on_step=True, on_epoch=False, batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the sums of the validation."""
        self.evaluation_sums.add(self.compute_sums(batch))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the sums of the test."""
        self.evaluation_sums.add(self.compute_sums(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs means over the whole validation set."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Logs means over the whole test set."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        if not self.evaluation_sums.values:
            self.evaluation_sums.add(self.zero_sums())
        totals = self.evaluation_sums.reduce(self.trainer.world_size)
        # the values are already the same on all ranks; sync_dist only prevents a warning of Lightning
        self.log_dict(token_means(totals, stage), batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Builds the optimizer (matrices decay, vectors do not, frozen weights are left out) and its schedule.

        Raises:
            UserError: no weight is trainable, or there is a schedule and the run has no end.
        """
        projections = self.projections.parameters() if self.projections is not None else ()
        trainable = trainable_parameters(self.model, self.backbone.quantization)
        optimizer = self.optimizer(parameter_groups([*trainable, *projections]))
        schedule = self.lr_scheduler(optimizer, total_steps(self.trainer)) if self.lr_scheduler is not None else None
        self.resumed.remember(optimizer)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trainable tensors only: megabytes instead of the base."""
        checkpoint["state_dict"] = trainable_only(self, checkpoint["state_dict"])
        if self._missing_arguments:
            missing = ", ".join(self._missing_arguments)
            warnings.warn(f"the checkpoint does not hold {missing}: pass it to load_from_checkpoint", stacklevel=2)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint's settings with the module's, or takes them over if the module is rebuilt from them.

        Raises:
            UserError: the checkpoint does not fit the module's arguments.
        """
        stored = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if self.attached_trainer is None:
            self._store_arguments(stored)
        else:
            self.resumed.compare(checkpoint, stored, self.hparams, self.trainer.state.fn == TrainerFn.FITTING)

    def on_train_start(self) -> None:
        """Applies the configured options to the optimizer and the schedule of a resumed fit."""
        self.resumed.apply(self.trainer)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a checkpoint's tensors. Every trainable tensor must be there, and no unknown one.

        Raises:
            UserError: the checkpoint was made with another backbone or other adapters.
        """
        if self.projections is None:  # only training needs the projections to a teacher's width
            state_dict = {name: t for name, t in state_dict.items() if not name.startswith("projections.")}
        with checked_loading():
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        return check_loaded_names(self, result)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Rebuilds a module from its checkpoint; the base is loaded from the place that the run loaded it from.

        Args:
            checkpoint_path: file in a run's ``checkpoints`` folder.
            map_location: device to build on; the CPU if None.
            **kwargs: constructor arguments that replace those of the run, and Lightning's own (``hparams_file``).

        Raises:
            UserError: the checkpoint names a class of a package that is not trusted, or does not fit its backbone.
        """
        kwargs.setdefault("weights_only", True)
        stored = read_arguments(checkpoint_path, kwargs["weights_only"], cls.CHECKPOINT_HYPER_PARAMS_KEY)
        check_class_paths({n: v for n, v in stored.items() if n not in kwargs}, cls.__module__.partition(".")[0])
        kwargs = {name: plain_or_itself(value) for name, value in kwargs.items()}
        device = map_location if isinstance(map_location, (str, torch.device)) else None
        with torch.device(device if device is not None else torch.get_default_device()):
            return super().load_from_checkpoint(checkpoint_path, map_location=map_location, **kwargs)

    def save_adapter(self, path: str | Path) -> None:
        """Writes the adapter in PEFT's format, for ``PeftModel.from_pretrained``; without an adapter, the whole model.

        Every rank of a trainer must call it, since each may hold a shard; rank zero writes.

        Args:
            path: folder, created if it does not exist.
        """
        trainer = self.attached_trainer
        save_adapter(self.model, path, self._backend, trainer is None or trainer.is_global_zero)

    def _store_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Stores the constructor's arguments as plain data, as the CLI does; others are left out."""
        plain, self._missing_arguments = plain_arguments(arguments)
        self.hparams.clear()
        self.save_hyperparameters(plain)
