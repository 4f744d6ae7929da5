"""Has the TPU's own compiler compile a graph for a TPU that is not there, and says what a core would need.

Run as a program (``python -m lightning_modules.strategies.xla.aot_compile FILE TPU``), since libtpu wants a process of
its own. Uses JAX's internal interfaces, so that jaxlib and libtpu are pinned (extra ``tpu_compile``).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TPU:
    """A TPU that can be rented.

    Attributes:
        topology: as libtpu names it.
        cores: devices that XLA sees.
        memory_gib: of each.
        options: of the topology: one chip is less than the host that libtpu takes for granted, and a v4's chip is one
            device, as torch_xla runs it.
    """

    topology: str
    cores: int
    memory_gib: int
    options: dict[str, Any] = field(default_factory=dict)


TPUS = {
    "v2-8": TPU("v2:2x2", 8, 8),
    "v3-8": TPU("v3:2x2", 8, 16),
    "v4-8": TPU("v4:2x2x1", 4, 32, {"chip_config_name": "megacore_dense"}),
    "v5e-1": TPU("v5e:1x1", 1, 16, {"chips_per_host_bounds": (1, 1, 1)}),
    "v5e-8": TPU("v5e:2x4", 8, 16),
    "v6e-1": TPU("v6e:1x1", 1, 32, {"chips_per_host_bounds": (1, 1, 1)}),
    "v6e-8": TPU("v6e:2x4", 8, 32),
}


def compile_graph(graph: str, name: str) -> dict[str, float]:
    """Compiles StableHLO for a TPU.

    Args:
        graph: of as many partitions as the TPU has cores.
        name: one of :data:`TPUS`.

    Returns:
        Bytes a core (``argument``, ``output``, ``alias``, ``temporary``, ``code``, ``peak``) and ``seconds``.
    """
    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies

    tpu = TPUS[name]
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=tpu.topology, **tpu.options).devices)
    for unknown in ("mhlo.is_dynamic = false,", "mhlo.cross_program_prefetches = [],", "mhlo.input_output_alias = [],"):
        graph = graph.replace(unknown, "")
    with mlir.make_ir_context():
        module = str(ir.Module.parse(graph)).encode()
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, tpu.cores
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id for device in devices]]))
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, tpu.cores
    build.use_spmd_partitioning, build.use_shardy_partitioner = True, False
    build.device_assignment = options.device_assignment
    began = time.monotonic()
    client: Any = devices[0].client
    executable = client.compile(module, xla_client.DeviceList(tuple(devices)), options)
    stats = executable.get_compiled_memory_stats()
    names = {
        "argument": "argument_size_in_bytes", "output": "output_size_in_bytes", "alias": "alias_size_in_bytes",
        "temporary": "temp_size_in_bytes", "code": "generated_code_size_in_bytes", "peak": "peak_memory_in_bytes",
    }  # fmt: skip
    return {key: float(getattr(stats, field)) for key, field in names.items()} | {"seconds": time.monotonic() - began}


def main(arguments: list[str]) -> None:
    """Prints the result as one line of JSON."""
    file, name = arguments
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": name,
        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    print(json.dumps(compile_graph(Path(file).read_text(encoding="utf-8"), name)))


if __name__ == "__main__":
    main(sys.argv[1:])
