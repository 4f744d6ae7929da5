"""One process, all XLA devices: the compiler divides each operation over a mesh (GSPMD, arXiv 2105.04663).

Lightning's XLA strategies keep a whole copy of the model on each device; a 7B model in bf16 leaves a TPU v3 core with
nothing. Here weights, gradients and optimizer states are divided over the devices (as FSDP does), and rows of a batch
too. On several hosts the same command is started on each (PyTorch/XLA SPMD guide, "Multi-host"): each reads its own
share of the data.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.io import XLACheckpointIO
from lightning.pytorch.strategies.single_device import SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from datamodules.batch import PREFIX, Batch
from datamodules.errors import UserError
from lightning_modules.strategies.xla.backend import XLABackend
from lightning_modules.strategies.xla.precision import TruePrecision
from lightning_modules.strategies.xla.sharding import Sharding

if TYPE_CHECKING:
    from lightning.pytorch.accelerators import Accelerator


class XLASPMDStrategy(SingleDeviceXLAStrategy):
    """Trains on every device of every host, each with its part of weights and rows.

    Args:
        data_parallel_size: groups of devices that have a whole copy of the weights each; 1 divides them over all
            devices.
        compilation_cache_dir: folder where compiled graphs are kept, so that a resumed run starts in seconds; None
            keeps none.
        accelerator: given by the trainer.
        checkpoint_io: given by the trainer.
        precision_plugin: given by the trainer.

    Attributes:
        sharding: the mesh; None until the trainer is set up.
    """

    strategy_name = "xla_spmd"

    def __init__(
        self,
        data_parallel_size: int = 1,
        compilation_cache_dir: str | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: TruePrecision | None = None,
    ) -> None:
        # not Lightning's XLA constructor, which would open the device
        SingleDeviceStrategy.__init__(
            self, torch.device("xla", 0), accelerator, checkpoint_io or HostCheckpointIO(), precision_plugin
        )
        self.debug = False
        self.data_parallel_size, self.compilation_cache_dir = data_parallel_size, compilation_cache_dir
        self.hosts = 1
        self.sharding: Sharding | None = None

    @property
    def backend(self) -> XLABackend:
        """What the model's parts ask for."""
        assert self.sharding is not None, "the backend is there once the trainer has set up its environment"
        return XLABackend(self.sharding, self.root_device)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Which share of the data this host reads."""
        return {"num_replicas": self.hosts, "rank": self.global_rank}

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the host that writes."""
        return self.global_rank == 0

    # ------------------------------------------------------------------ set up

    def set_world_ranks(self) -> None:
        """Opens the devices; the trainer calls it once the accelerator is known to be there.

        Raises:
            UserError: the precision is Lightning's own, or ``data_parallel_size`` does not divide the devices.
        """
        import torch_xla.runtime as xr

        if not isinstance(self.precision_plugin, TruePrecision):
            raise UserError(
                "trainer.precision: on XLA Lightning's bf16-true is an environment variable that rounds the loss too; "
                "leave it out and give plugins: [lightning_modules.strategies.TruePrecision]"
            )
        if self.sharding is None:
            if self.compilation_cache_dir is not None:
                xr.initialize_cache(str(Path(self.compilation_cache_dir).expanduser()))
            xr.use_spmd()
            self.sharding = self._make_sharding(xr.global_runtime_device_count())
            self.hosts, self.global_rank = xr.process_count(), xr.process_index()
            rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _make_sharding(self, devices: int) -> Sharding:
        return Sharding(self.data_parallel_size, devices)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Builds models on the host: on the device every initialisation would be a graph, and other numbers."""
        with self.precision_plugin.tensor_init_context():
            yield

    def model_to_device(self) -> None:
        """Divides the weights over the devices."""
        assert self.model is not None
        self.backend.place(self.model)
        self.model.to(self.root_device)  # moves nothing; the module learns where it is
        self.sync()

    def setup(self, trainer: Trainer) -> None:
        """Prepares the model, and optimizer states where an optimizer makes them beforehand: one compilation less."""
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            for optimizer in self.optimizers:
                if hasattr(optimizer, "create_state"):
                    optimizer.create_state()
            self._divide_states()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the optimizers' states, divided as the weights are."""
        super().load_optimizer_state_dict(checkpoint)
        self._divide_states()

    def _divide_states(self) -> None:
        assert self.sharding is not None
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                self.sharding.mark(value for value in state.values() if isinstance(value, Tensor))
        self.sync()

    # ------------------------------------------------------------------ steps

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Sends a batch, each device its rows.

        Raises:
            UserError: rows can't be divided, or hold what can't be served on these devices.
        """
        batch = super().batch_to_device(batch, torch.device("cpu"), dataloader_idx)
        if isinstance(batch, Batch):
            self._check(batch)
            return batch.map_tensors(self._send)
        return apply_to_collection(batch, Tensor, self._send)

    def _send(self, tensor: Tensor) -> Tensor:
        assert self.sharding is not None
        return self.sharding.send_rows(tensor, self.root_device, self.hosts)

    def _check(self, batch: Batch) -> None:
        if batch.extras:
            raise UserError(
                "objective.cache: a cached teacher's targets are not divided over XLA devices; set it to null, and "
                "teacher to base, which takes no memory"
            )
        backbone = getattr(self.lightning_module, "backbone", None)
        if getattr(backbone, "attn_implementation", None) == "pallas" and bool((batch.segment_ids_BT == PREFIX).any()):
            raise UserError(
                "backbone.attn_implementation pallas: it knows no shared prefix; set data.init_args.packing packed"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Computes what is left from before: a micro-batch's gradients, or a callback's sums.

        So a step's graph holds one micro-batch and nothing that callbacks do now and then.
        """
        self.sync()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Steps, and has everything since the last step computed."""
        result = super().optimizer_step(*args, **kwargs)
        self.sync()
        return result

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Computes a batch: Lightning would trace all of them into one graph."""
        return self._computed(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Computes a batch."""
        return self._computed(super().test_step(*args, **kwargs))

    def _computed(self, output: Any) -> Any:
        self.sync()
        return output

    def sync(self) -> None:
        """Has the devices compute what was only noted so far."""
        import torch_xla

        torch_xla.sync()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Divides the gradients as the weights are."""
        assert self.sharding is not None and self.model is not None
        self.sharding.mark(p.grad for p in self.model.parameters() if p.grad is not None)

    # ------------------------------------------------------------------ checkpoints and the end

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Collects the tensors, which takes every host, and lets one of them write."""
        super().save_checkpoint(self.backend.collect(checkpoint), filepath, storage_options)

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Waits for the other hosts."""
        if self.hosts > 1:
            import torch_xla.core.xla_model as xm

            xm.rendezvous(name or "barrier")

    def teardown(self) -> None:
        """Leaves the weights on the devices: the host would have to collect all of them, for nothing."""
        self.precision_plugin.teardown()


class HostCheckpointIO(XLACheckpointIO):
    """Writes as for any other device, whole or not at all; the strategy has brought the tensors to the host."""

    def __init__(self) -> None:
        pass

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint of tensors on the host."""
        TorchCheckpointIO.save_checkpoint(self, checkpoint, path, storage_options)
