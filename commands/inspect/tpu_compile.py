"""``inspect --compile TPU``: compiles a training step of the config for a TPU and reports its memory per core."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from datamodules.errors import UserError
from datamodules.findings import FindingsDataModule
from datamodules.output_text import console_text
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.models.backbone import RANDOM
from lightning_modules.strategies.xla.accelerator import check_torch_xla
from lightning_modules.strategies.xla.aot_compile import TPUS

if TYPE_CHECKING:
    from commands.config_only_cli import ConfigOnlyCLI

GIB = 2**30
REPOSITORY = Path(__file__).parents[2]  #: the compiler's process imports this project from here
PARTS = {
    "argument": "weights, gradients, optimizer state, rows",
    "temporary": "activations and gathered weights",
    "peak": "peak",
}


def check_compile(tpu: str) -> None:
    """Raises an error if the TPU is unknown or the compiler is not installed.

    Args:
        tpu: value of ``--compile``.

    Raises:
        UserError: the TPU is unknown, or a package is missing.
    """
    if tpu not in TPUS:
        raise UserError(f"inspect: --compile {tpu}: no such TPU. Fix: give one of {', '.join(TPUS)}.")
    check_torch_xla()
    missing = [package for package in ("jax", "libtpu") if find_spec(package) is None]
    if missing:
        raise UserError(
            f"inspect: --compile {tpu}: {' and '.join(missing)} not installed. Fix: `pip install -e "
            "'.[tpu,tpu_compile]'`."
        )


def compile_run(cli: ConfigOnlyCLI, tpu: str) -> dict[str, Any]:
    """Traces a training step with tensors without storage, and compiles it for a TPU.

    Args:
        cli: has the model, the data and the trainer's settings.
        tpu: name in :data:`lightning_modules.strategies.xla.aot_compile.TPUS`.

    Returns:
        JSON-ready settings, GiB per core, seconds, and whether the step fits into the memory.

    Raises:
        UserError: the config has other classes than this project's, or the compiler fails.
    """
    data, module, cores = cli.datamodule, cli.model, TPUS[tpu].cores
    if not isinstance(data, FindingsDataModule) or not isinstance(module, CausalLMModule):
        raise UserError("inspect --compile: unknown classes. Fix: use FindingsDataModule and CausalLMModule.")
    if data.batch_size % cores:
        raise UserError(
            f"data.init_args.batch_size {data.batch_size}: no multiple of the {cores} cores of a {tpu}. Fix: give one."
        )
    steps = _trainer_options(cli.trainer_config)
    console = Console(stderr=True)
    name = module.backbone.model_name_or_path.removeprefix(RANDOM)
    console.print(console_text(f"tracing a step of {name}, without weights ..."))
    began = time.monotonic()
    graph = _trace(module, data, cores, _data_parallel_size(cli.trainer_config), steps)
    traced = time.monotonic() - began
    console.print(f"traced in {traced:.0f} s; libtpu compiles it for a {tpu} (minutes for a 7B model) ...")
    cost = _compile(graph, tpu)
    # the compiler's peak does not include gaps between allocations
    cost["peak"] = max(cost["peak"], cost["argument"] + cost["temporary"])
    memory = TPUS[tpu].memory_gib
    return {
        "tpu": tpu, "cores": cores, "memory_gib": memory, "rows": data.batch_size,
        "sequence_length": data.sequence_length,
        "tokens_a_core": data.batch_size * data.sequence_length // cores, **steps,
        "gib_a_core": {part: cost[part] / GIB for part in ("argument", "output", "temporary", "peak", "code")},
        "seconds": {"trace": round(traced, 1), "compile": round(cost["seconds"], 1)},
        "fits": cost["peak"] <= memory * GIB,
    }  # fmt: skip


def _trace(module: CausalLMModule, data: FindingsDataModule, cores: int, groups: int, steps: dict[str, Any]) -> str:
    from lightning_modules.strategies.xla.tracing import trace_step

    return trace_step(
        module, data.batch_size, data.sequence_length, cores, data_parallel_size=groups, max_steps=1, **steps
    )


def _trainer_options(trainer: Namespace) -> dict[str, Any]:
    """Returns the trainer's settings that change the step's graph.

    A step of more than two micro-batches has the same graph as a step of two.
    """
    accumulate = int(trainer.get("accumulate_grad_batches") or 1)
    options: dict[str, Any] = {"accumulate_grad_batches": min(accumulate, 2)}
    for name in ("gradient_clip_val", "gradient_clip_algorithm"):
        if trainer.get(name) is not None:
            options[name] = trainer.get(name)
    return options


def _data_parallel_size(trainer: Namespace) -> int:
    strategy = trainer.get("strategy")
    arguments = strategy.get("init_args") if isinstance(strategy, Namespace) else None
    return int((arguments or {}).get("data_parallel_size") or 1)


def _compile(graph: str, tpu: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.mlir"
        file.write_text(graph, encoding="utf-8")
        command = [sys.executable, "-m", "lightning_modules.strategies.xla.aot_compile", str(file), tpu]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)  # noqa: S603
    if done.returncode in (-9, 137):
        raise UserError(
            f"inspect: --compile {tpu}: ran out of host memory. A 7B model needs 6 GB, more than 20 GB if its layers "
            "can't be compiled as a loop. Fix: set backbone.lora.dropout to 0 and lora.num_top_layers to null, or use "
            "a host with more memory."
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "RESOURCE_EXHAUSTED" in line), lines[-1] if lines else "")
        raise UserError(
            f"inspect: --compile {tpu}: the compiler failed ({reason[:400]}). Fix: if memory ran out, lower "
            "data.init_args.batch_size or sequence_length."
        )
    cost: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return cost


def print_compiled(report: dict[str, Any]) -> None:
    """Prints the report of :func:`compile_run`."""
    table = Table(title=f"{report['tpu']}: {report['rows']} rows of {report['sequence_length']} tokens, per core")
    table.add_column("memory")
    table.add_column("GiB", justify="right")
    for part, name in PARTS.items():
        table.add_row(name, f"{report['gib_a_core'][part]:.2f}")
    table.add_row("memory of the core", f"{report['memory_gib']:.2f}")
    Console().print(table)
    print(f"traced in {report['seconds']['trace']:.0f} s, compiled in {report['seconds']['compile']:.0f} s")


def check_fits(report: dict[str, Any]) -> None:
    """Raises an error if the step needs more memory than a core has.

    Args:
        report: result of :func:`compile_run`.

    Raises:
        UserError: the step does not fit.
    """
    if not report["fits"]:
        raise UserError(
            f"inspect: --compile {report['tpu']}: a step needs {report['gib_a_core']['peak']:.1f} GiB of the "
            f"{report['memory_gib']} GiB of a core. Fix: lower data.init_args.batch_size or sequence_length (and raise "
            "trainer.accumulate_grad_batches)."
        )
