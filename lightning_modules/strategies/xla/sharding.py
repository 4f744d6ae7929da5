"""Layouts of tensors on a mesh of devices.

The mesh has two axes. Weights are sharded along ``fsdp`` and replicated along ``data``; the rows of a batch are sharded
along both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.strategies.xla.compat import annotate_sharding, mark_sharding

if TYPE_CHECKING:
    import torch

AXES = ("data", "fsdp")
Spec = tuple[Any, ...]  #: for each dimension None (replicated), or the mesh axes along which it is sharded


def weight_spec(shape: Sequence[int], devices: int) -> Spec:
    """Returns the layout of a weight: its largest divisible dimension is sharded; without one it is replicated.

    Args:
        shape: of the weight.
        devices: number of devices along ``fsdp``.
    """
    divisible = [dimension for dimension, size in enumerate(shape) if size and size % devices == 0]
    largest = max(divisible, key=lambda dimension: shape[dimension], default=None)
    return tuple("fsdp" if dimension == largest else None for dimension in range(len(shape)))


def row_spec(dimensions: int) -> Spec:
    """Returns the layout of rows: the first dimension is sharded over all devices."""
    return (AXES, *(None,) * (dimensions - 1))


class Sharding:
    """A mesh over all devices, and the placement of tensors on it.

    Args:
        data_parallel_size: number of devices along ``data``; the others are along ``fsdp``.
        devices: number of all devices.

    Raises:
        UserError: ``data_parallel_size`` does not divide the devices.
    """

    def __init__(self, data_parallel_size: int, devices: int) -> None:
        from torch_xla.distributed import spmd

        if data_parallel_size < 1 or devices % data_parallel_size:
            raise UserError(
                f"strategy.init_args.data_parallel_size {data_parallel_size} does not divide the {devices} "
                "devices; 1 always does"
            )
        self.devices, self.fsdp = devices, devices // data_parallel_size
        self.mesh = spmd.Mesh(np.arange(devices), (data_parallel_size, self.fsdp), AXES)
        spmd.set_global_mesh(self.mesh)

    def place(self, model: nn.Module, device: torch.device) -> None:
        """Moves a module to the devices, one tensor at a time, so the host never holds a second copy of the weights."""
        for module in model.modules():
            module._apply(lambda tensor: tensor.to(device), recurse=False)
            self.mark((*module._parameters.values(), *module._buffers.values()))

    def mark(self, tensors: Iterable[Tensor | None]) -> None:
        """Shards weights, gradients or optimizer states; tensors that are sharded already are unchanged."""
        for tensor in tensors:
            if tensor is not None and tensor.device.type == "xla":
                self.annotate(tensor, weight_spec(tensor.shape, self.fsdp))

    def annotate(self, tensor: Tensor, spec: Spec) -> None:
        """Sets the layout of a tensor."""
        mark_sharding(tensor, self.mesh.get_op_sharding(spec))

    def constrain(self, tensor: Tensor, spec: Spec) -> None:
        """Sets the layout of an intermediate result in the graph, also within a loop."""
        annotate_sharding(tensor, self.mesh.get_op_sharding(spec))

    def send_rows(self, tensor: Tensor, device: torch.device, hosts: int) -> Tensor:
        """Sends a tensor that is sharded along its first dimension; each host has its own rows of it.

        Args:
            tensor: this host's rows.
            device: the device that PyTorch sees.
            hosts: number of hosts.

        Raises:
            UserError: the devices do not divide the number of rows.
        """
        import torch_xla.core.xla_model as xm
        from torch_xla.distributed.spmd import ShardingSpec

        if tensor.ndim == 0 or (tensor.shape[0] * hosts) % self.devices:
            raise UserError(
                f"data.init_args.batch_size: {tensor.shape[0] if tensor.ndim else 0} rows can't be divided over the "
                f"{self.devices // hosts} devices of this host; set it to a multiple of {self.devices // hosts}"
            )
        spec = ShardingSpec(self.mesh, row_spec(tensor.ndim), minibatch=hosts > 1)
        return xm.send_cpu_data_to_device(tensor, device, spec)[0]
