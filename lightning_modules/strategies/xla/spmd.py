"""The strategy for XLA devices: one process, and a compiler that partitions operations (GSPMD, arXiv 2105.04663).

Lightning's XLA strategies keep a full copy of the model on each device; a 7B model in bf16 would fill the memory of a
TPU v3 core. Here weights, gradients and optimizer states are sharded over the devices, as in FSDP, and so are the rows
of a batch. With several hosts, start the same command on each (PyTorch/XLA SPMD guide, "Multi-host"): each host reads
its own part of the data.
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
    """Trains on every device of every host, each with its shards of weights and rows.

    Args:
        data_parallel_size: number of groups of devices, each with a full copy of the weights; 1 shards the weights
            over all devices.
        compilation_cache_dir: folder of compiled graphs, so that a resumed run starts in seconds; None for no cache.
        accelerator: set by the trainer.
        checkpoint_io: set by the trainer.
        precision_plugin: set by the trainer.

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
        """The backend of the model's parts."""
        assert self.sharding is not None, "there is no backend before the trainer has set up its environment"
        return XLABackend(self.sharding, self.root_device)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """The part of the data that this host reads."""
        return {"num_replicas": self.hosts, "rank": self.global_rank}

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the host that writes."""
        return self.global_rank == 0

    # ------------------------------------------------------------------ set up

    def set_world_ranks(self) -> None:
        """Opens the devices; the trainer calls it after it has checked that the accelerator is available.

        Raises:
            UserError: the precision plugin is Lightning's own, or ``data_parallel_size`` does not divide the devices.
        """
        import torch_xla.runtime as xr

        if not isinstance(self.precision_plugin, TruePrecision):
            raise UserError(
                "trainer.precision: on XLA Lightning's bf16-true is an environment variable that rounds the loss too; "
                "leave it out and set trainer.plugins: [lightning_modules.strategies.TruePrecision]"
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
        """Builds models on the host: on the device each initialisation would be a graph, with other random numbers."""
        with self.precision_plugin.tensor_init_context():
            yield

    def model_to_device(self) -> None:
        """Shards the weights over the devices."""
        assert self.model is not None
        self.backend.place(self.model)
        self.model.to(self.root_device)  # moves no tensor; it sets the module's device
        self.sync()

    def setup(self, trainer: Trainer) -> None:
        """Prepares the model, and the states of optimizers that can create them before the first step.

        The step that creates states would be compiled separately.
        """
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            for optimizer in self.optimizers:
                if hasattr(optimizer, "create_state"):
                    optimizer.create_state()
            self._shard_states()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the optimizers' states, sharded as the weights are."""
        super().load_optimizer_state_dict(checkpoint)
        self._shard_states()

    def _shard_states(self) -> None:
        assert self.sharding is not None
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                self.sharding.mark(value for value in state.values() if isinstance(value, Tensor))
        self.sync()

    # ------------------------------------------------------------------ steps

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Sends a batch to the devices, each its own rows.

        Raises:
            UserError: the devices do not divide the rows, or the batch holds something that they do not support.
        """
        batch = super().batch_to_device(batch, torch.device("cpu"), dataloader_idx)
        if isinstance(batch, Batch):
            self.check_batch(batch)
            return batch.map_tensors(self._send)
        return apply_to_collection(batch, Tensor, self._send)

    def _send(self, tensor: Tensor) -> Tensor:
        assert self.sharding is not None
        return self.sharding.send_rows(tensor, self.root_device, self.hosts)

    def check_batch(self, batch: Batch) -> None:
        """Refuses batches that XLA devices do not support.

        Raises:
            UserError: it holds targets of a cached teacher, or a shared prefix for a kernel without support for it.
        """
        if batch.extras:
            raise UserError(
                "objective.cache: a cached teacher's targets can't be sharded over XLA devices; set it to null, and "
                "teacher to base, which takes no memory"
            )
        backbone = getattr(self.lightning_module, "backbone", None)
        if getattr(backbone, "attn_implementation", None) == "pallas" and bool((batch.segment_ids_BT == PREFIX).any()):
            raise UserError(
                "backbone.attn_implementation=pallas: does not support a shared prefix. Fix: set "
                "data.init_args.packing to packed"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Runs the operations recorded so far: the gradients of a micro-batch, or the sums of a callback.

        So the graph of a step holds one micro-batch, and no operation that a callback runs only at times.
        """
        self.sync()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Steps, and runs everything recorded since the last step."""
        result = super().optimizer_step(*args, **kwargs)
        self.sync()
        return result

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one batch; Lightning would trace all batches into one graph."""
        return self._synced(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one batch; see :meth:`validation_step`."""
        return self._synced(super().test_step(*args, **kwargs))

    def _synced(self, output: Any) -> Any:
        self.sync()
        return output

    def sync(self) -> None:
        """Has the devices run the operations that were only recorded so far."""
        import torch_xla

        torch_xla.sync()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Shards the gradients as the weights are."""
        assert self.sharding is not None and self.model is not None
        self.sharding.mark(p.grad for p in self.model.parameters() if p.grad is not None)

    # ------------------------------------------------------------------ checkpoints and the end

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Gathers the tensors on the host, which every host must do, and writes them on one."""
        super().save_checkpoint(self.backend.collect(checkpoint), filepath, storage_options)

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Waits for the other hosts."""
        if self.hosts > 1:
            import torch_xla.core.xla_model as xm

            xm.rendezvous(name or "barrier")

    def teardown(self) -> None:
        """Leaves the weights on the devices; gathering all of them on the host would have no use."""
        self.precision_plugin.teardown()


class HostCheckpointIO(XLACheckpointIO):
    """Writes checkpoints as for other devices; the strategy has copied the tensors to the host."""

    def __init__(self) -> None:
        pass

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint of tensors on the host, in one step."""
        TorchCheckpointIO.save_checkpoint(self, checkpoint, path, storage_options)
