"""Ahead-of-time compilation with a compiler that is replaced; the real one needs the extra tpu_compile."""

import json
import os
from types import SimpleNamespace

import pytest

from lightning_modules.strategies.xla import aot_compile
from lightning_modules.strategies.xla.aot_compile import MEMORY_STATS, TPUS, compile_graph, main

STATS = {name: 10 * (index + 1) for index, name in enumerate(MEMORY_STATS.values())}


@pytest.fixture
def compiled(monkeypatch):
    """Replaces the compiler; returns the list of its calls."""
    calls = []

    def compile_for_topology(graph, topology, partitions, **options):
        calls.append((graph, topology, partitions, options))
        return SimpleNamespace(get_compiled_memory_stats=lambda: SimpleNamespace(**STATS)), 2.5

    monkeypatch.setattr(aot_compile, "compile_for_topology", compile_for_topology)
    return calls


def test_the_compiler_gets_the_topology_of_the_tpu(compiled):
    result = compile_graph("module {}", "v4-8")
    assert compiled == [("module {}", "v4:2x2x1", 4, {"chip_config_name": "megacore_dense"})]
    assert result == {
        "argument": 10.0, "output": 20.0, "alias": 30.0, "temporary": 40.0, "code": 50.0, "peak": 60.0, "seconds": 2.5,
    }  # fmt: skip


def test_the_program_prints_one_line_of_json(compiled, tmp_path, capsys, monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID",
                 "ALLOW_MULTIPLE_LIBTPU_LOAD"):  # fmt: skip
        monkeypatch.setenv(name, "")  # so that the values are undone
    file = tmp_path / "step.mlir"
    file.write_text("module @step {}")
    main([str(file), "v3-8"])
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert json.loads(output)["peak"] == 60.0
    assert compiled[0][:3] == ("module @step {}", "v3:2x2", 8)
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v3-8"


@pytest.mark.parametrize("name", TPUS)
def test_each_tpu_has_as_many_devices_as_its_topology(name):
    tpu, chips = TPUS[name], 1
    for size in tpu.topology.partition(":")[2].split("x"):
        chips *= int(size)
    cores_per_chip = 2 if name[:2] in ("v2", "v3") else 1  # both cores of a v4 chip are one device
    assert tpu.cores == chips * cores_per_chip
    assert tpu.topology.startswith(name.partition("-")[0])
