"""How tensors lie on a mesh of devices.

The mesh has two axes: weights are divided along ``fsdp`` (and repeated along ``data``), rows of a batch along both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from datamodules.errors import UserError

if TYPE_CHECKING:
    import torch

AXES = ("data", "fsdp")
Spec = tuple[Any, ...]  #: of each dimension: None (whole on every device), or the axes along which it is divided


def weight_spec(shape: Sequence[int], devices: int) -> Spec:
    """Divides the largest dimension that can be; a tensor without one is whole on every device.

    Args:
        shape: of the weight.
        devices: along ``fsdp``.
    """
    divisible = [dimension for dimension, size in enumerate(shape) if size and size % devices == 0]
    largest = max(divisible, key=lambda dimension: shape[dimension], default=None)
    return tuple("fsdp" if dimension == largest else None for dimension in range(len(shape)))


def row_spec(dimensions: int) -> Spec:
    """Divides the first dimension over all devices."""
    return (AXES, *(None,) * (dimensions - 1))


class Sharding:
    """A mesh over all devices, and where tensors lie on it.

    Args:
        data_parallel_size: devices along ``data``; the others along ``fsdp``.
        devices: how many there are.

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
        """Moves a module to the devices, a tensor at a time: the host never holds a second copy of the weights."""
        for module in model.modules():
            module._apply(lambda tensor: tensor.to(device), recurse=False)
            self.mark((*module._parameters.values(), *module._buffers.values()))

    def mark(self, tensors: Iterable[Tensor | None]) -> None:
        """Divides weights, gradients or optimizer states; those that are marked already stay."""
        for tensor in tensors:
            if tensor is not None and tensor.device.type == "xla":
                self.annotate(tensor, weight_spec(tensor.shape, self.fsdp))

    def annotate(self, tensor: Tensor, spec: Spec) -> None:
        """Says how a tensor lies; a copy on the host is sent so."""
        import torch_xla

        # xs.mark_sharding without its search for jax at every call
        torch_xla._XLAC._xla_mark_sharding(tensor, self.mesh.get_op_sharding(spec))

    def constrain(self, tensor: Tensor, spec: Spec) -> None:
        """Says in the graph how a tensor lies that is computed there, also within a loop."""
        import torch_xla

        torch_xla._XLAC._xla_annotate_custom_sharding(tensor, self.mesh.get_op_sharding(spec))

    def send_rows(self, tensor: Tensor, device: torch.device, hosts: int) -> Tensor:
        """Sends a tensor, divided by its first dimension; each host has its own part of it.

        Raises:
            UserError: it can't be divided.
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
