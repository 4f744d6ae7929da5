"""Compiles a graph with the TPU's own compiler, without a TPU, and reports the memory per core.

Run it as a program (``python -m lightning_modules.strategies.xla.aot_compile FILE TPU``): libtpu needs a process of its
own. The versions of jaxlib and libtpu are pinned by the extra ``tpu_compile``.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_modules.strategies.xla.compat import compile_for_topology

#: names of the results, and those of the compiler's statistics
MEMORY_STATS = {
    "argument": "argument_size_in_bytes", "output": "output_size_in_bytes", "alias": "alias_size_in_bytes",
    "temporary": "temp_size_in_bytes", "code": "generated_code_size_in_bytes", "peak": "peak_memory_in_bytes",
}  # fmt: skip


@dataclass(frozen=True)
class TPU:
    """A TPU that Google Cloud rents out.

    Attributes:
        topology: its name in libtpu.
        cores: number of devices that XLA sees.
        memory_gib: memory of each device.
        options: of the topology. A single chip is less than the host that libtpu assumes, and both cores of a v4 chip
            are one device, as in torch_xla.
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
        graph: StableHLO as text, with as many partitions as the TPU has cores.
        name: a key of :data:`TPUS`.

    Returns:
        Bytes per core (``argument``, ``output``, ``alias``, ``temporary``, ``code``, ``peak``) and ``seconds``.
    """
    tpu = TPUS[name]
    executable, seconds = compile_for_topology(graph, tpu.topology, tpu.cores, **tpu.options)
    stats = executable.get_compiled_memory_stats()
    return {key: float(getattr(stats, name)) for key, name in MEMORY_STATS.items()} | {"seconds": seconds}


def main(arguments: list[str]) -> None:
    """Prints the result as one line of JSON.

    Args:
        arguments: file of the graph, and the name of the TPU.
    """
    file, name = arguments
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": name,
        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    print(json.dumps(compile_graph(Path(file).read_text(encoding="utf-8"), name)))


if __name__ == "__main__":
    main(sys.argv[1:])
