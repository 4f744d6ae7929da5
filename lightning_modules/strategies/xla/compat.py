"""The private interfaces of torch_xla and JAX that this package uses, each with the reason.

The extras ``tpu`` (torch_xla 2.9.0) and ``tpu_compile`` (jaxlib and libtpu) pin the versions, so a new version can only
break the functions of this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

#: attributes of torch_xla's StableHLO that the pinned parser of JAX does not know
_UNKNOWN_ATTRIBUTES = (
    "mhlo.is_dynamic = false,", "mhlo.cross_program_prefetches = [],", "mhlo.input_output_alias = [],",
)  # fmt: skip


def mark_sharding(tensor: Tensor, op_sharding: Any) -> None:
    """Shards a tensor; a copy on the host is sent to the devices in this layout.

    The public ``xs.mark_sharding`` searches for jax at every call.
    """
    import torch_xla

    torch_xla._XLAC._xla_mark_sharding(tensor, op_sharding)


def annotate_sharding(tensor: Tensor, op_sharding: Any) -> None:
    """Adds the layout of an intermediate result to the graph; there is no public form for results within a loop."""
    import torch_xla

    torch_xla._XLAC._xla_annotate_custom_sharding(tensor, op_sharding)


def copy_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors to the host in one transfer; ``tensor.cpu()`` makes one transfer per tensor."""
    import torch_xla

    hosted: list[Tensor] = torch_xla._XLAC._xla_get_cpu_tensors(list(tensors))
    return hosted


def num_tpu_chips() -> int:
    """Returns the number of TPU chips on the PCI bus; the public calls open the devices, and fail without a TPU."""
    from torch_xla._internal import tpu

    return int(tpu.num_available_chips())


def scan(
    step: Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]],
    carry: list[Tensor],
    inputs: list[Tensor],
    reverse: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Loops over the first axis of tensors as ``jax.lax.scan`` does.

    torch_xla's public ``scan`` has AOTAutograd build the backward pass.

    Args:
        step: takes the carry and one slice of each input; returns the next carry, and outputs that are stacked.
        carry: the first carry.
        inputs: tensors with equal first axes.
        reverse: loop from the last slice to the first.

    Returns:
        The last carry, and the stacked outputs.
    """
    from torch_xla.experimental.scan import _scan_impl_flat

    last, outputs = _scan_impl_flat(step, carry, inputs, reverse)
    return last, outputs


def compile_for_topology(graph: str, topology: str, partitions: int, **options: Any) -> tuple[Any, float]:
    """Compiles StableHLO with libtpu for a TPU that this machine does not have.

    JAX's public ahead-of-time compilation starts from a JAX function, not from StableHLO.

    Args:
        graph: StableHLO as text.
        topology: name of the TPU's topology in libtpu.
        partitions: devices that the graph is partitioned over.
        **options: of the topology.

    Returns:
        JAX's executable, and the seconds that the compiler took.
    """
    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies

    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    for attribute in _UNKNOWN_ATTRIBUTES:
        graph = graph.replace(attribute, "")
    with mlir.make_ir_context():
        module = str(ir.Module.parse(graph)).encode()
    compile_options = xla_client.CompileOptions()
    compile_options.num_replicas, compile_options.num_partitions = 1, partitions
    device_ids = np.array([[device.id for device in devices]])
    compile_options.device_assignment = xla_client.DeviceAssignment.create(device_ids)
    build = compile_options.executable_build_options
    build.num_replicas, build.num_partitions = 1, partitions
    build.use_spmd_partitioning, build.use_shardy_partitioner = True, False
    build.device_assignment = compile_options.device_assignment
    client: Any = devices[0].client
    start = time.monotonic()
    executable = client.compile(module, xla_client.DeviceList(tuple(devices)), compile_options)
    return executable, time.monotonic() - start
