"""The strategy for a base that is too large for one GPU: weights sharded over all GPUs (FSDP2), ordinary checkpoints.

Lightning's own ``ModelParallelStrategy`` leaves sharding to the module. At each checkpoint it gathers the frozen base
too, or writes a folder that only it can read. Here the backend shards (:class:`FSDP2Backend`), and a checkpoint is the
same small file of full trainable tensors as with every other strategy, so a run can resume on another number of GPUs,
or on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_modules.strategies.fsdp2_backend import FSDP2Backend, gather, shard_like


class FSDP2Strategy(ModelParallelStrategy):
    """Shards a frozen base and its adapters over every GPU of every host, layer by layer.

    Args:
        process_group_backend: nccl or gloo; None for the one that fits the device.
        timeout: of a collective; also the limit of the time in which rank zero loads the weights.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def backend(self) -> FSDP2Backend:
        """The backend of the model's parts."""
        return FSDP2Backend(self.device_mesh["data_parallel"], self.root_device)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning passes the optimizers' states to :meth:`load_optimizer_state_dict`, as on one device."""
        return True

    def setup_environment(self) -> None:
        """Starts the processes, with all ranks in one data-parallel dimension."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gathers the trained parameters, without the base; every rank must call it."""
        assert self.model is not None
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        state: dict[str, Any] = self._gather(trained)
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gathers an optimizer's state in the form of a single device; every rank must call it."""
        state: dict[str, Any] = self._gather(getattr(optimizer, "optimizer", optimizer).state_dict())
        return state

    def _gather(self, data: Any) -> Any:
        """Gathers all tensors of nested data; rank zero keeps copies on the host, the other ranks keep nothing."""

        def gathered(tensor: DTensor) -> Tensor:
            copy = gather(tensor.detach())
            return copy.cpu() if self.is_global_zero else copy.new_empty(0, device="cpu")

        return apply_to_collection(data, DTensor, gathered)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes one file, on rank zero."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of this or of any other strategy, on every rank."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads the trained tensors, each rank its shards."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        state = {n: shard_like(t, parameters.get(n, t)) for n, t in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the optimizers' states, sharded as their parameters are."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            sharded = {
                number: apply_to_collection(state["state"].get(number, {}), Tensor, shard_like, like=parameter)
                for number, parameter in zip(numbers, parameters, strict=True)
            }
            optimizer.load_state_dict({**state, "state": sharded})
