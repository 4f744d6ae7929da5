"""Record of a run: ``run.json`` (code, packages, devices, data, outcome), ``report.html``, and a printed summary."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from callbacks.paths import checkpoint_directory, run_directory
from callbacks.preemption import Interrupted, slurm_job
from callbacks.reporting.html_report import REPORT_FILE, write_report
from callbacks.run_config import repeated_options
from datamodules.files import atomic_write
from datamodules.output_text import printable
from datamodules.redaction import redact, redact_command, redact_text

REPOSITORY = Path(__file__).parents[1]
PACKAGES = (
    "torch", "lightning", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors", "datasets", "numpy",
    "torchmetrics", "jsonargparse", "torch_xla", "triton",
)  # fmt: skip


class RunRecord(Callback):
    """Writes ``<run>/run.json`` at the start and the end of a fit, then the report, and prints a summary.

    The file is first written at the first step, so a start that fails before that writes nothing. It is replaced
    atomically. Its ``state`` is ``running``, ``finished``, ``interrupted`` or ``failed``; it stays
    ``running`` if the process was killed. A resumed run writes the same file and keeps the earlier records under
    ``previous``. Secrets are masked (see :mod:`datamodules.redaction`). Only rank zero writes.

    Args:
        config: file name of the resolved config that LightningCLI writes to the run directory.
    """

    def __init__(self, config: str = "config.yaml") -> None:
        self.config = config
        self._run = Path()
        self._record: dict[str, Any] = {}
        self._written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolves the run directory; called on all ranks."""
        self._run = run_directory(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects the facts that are known before the first step."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        previous = self._previous()
        self._record = describe(trainer, pl_module) | {"config": self.config, "previous": previous}
        self._written = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Writes the record before the first batch."""
        if self._record and not self._written:
            resumed = getattr(pl_module, "resumed", None)
            self._record["changed_since_checkpoint"] = list(getattr(resumed, "changed", []))
            self._write()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records step, epoch and metrics before the trainer is torn down."""
        if self._record:  # empty on all ranks but zero
            self._record |= progress(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the end of a fit, after the other callbacks have printed their output at the end of training."""
        if self._record:
            if "step" not in self._record:  # resumed after the last step: on_train_end was not called
                self._record |= progress(trainer)
            self._finish(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the state of an interrupted or failed fit, if it had begun."""
        if not self._written:
            self._record = {}
            return
        self._record |= progress(trainer)
        if isinstance(exception, (Interrupted, KeyboardInterrupt, SIGTERMException)):
            self._finish(trainer, "interrupted")
        else:
            self._record["error"] = redact_text(f"{type(exception).__name__}: {exception}")[:2000]
            self._finish(trainer, "failed")

    def _finish(self, trainer: Trainer, state: str) -> None:
        self._record |= {"state": state, "ended": _now()}
        self._write()
        if state != "failed":
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.flush()
            write_report(self._run)
            checkpoints = checkpoint_directory(trainer, self._run)
            summary = format_summary(self._run, checkpoints, self.config, self._record)
            Console().print(printable(summary, newlines=True), highlight=False, soft_wrap=True, markup=False)
        self._record, self._written = {}, False

    def _previous(self) -> list[dict[str, Any]]:
        try:
            record = json.loads((self._run / "run.json").read_text(encoding="utf-8"))
            return [*record.pop("previous", []), record]
        except (OSError, ValueError):
            return []

    def _write(self) -> None:
        self._run.mkdir(parents=True, exist_ok=True)
        atomic_write(self._run / "run.json", json.dumps(redact(self._record), indent=2, default=str) + "\n")
        self._written = True


def describe(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Returns the facts that are known before the first step: command, code, packages, machine and data."""
    fingerprint = getattr(getattr(trainer, "datamodule", None), "fingerprint", None)
    return {
        "state": "running",
        "started": _now(),
        "command": redact_command([Path(sys.executable).name, *sys.argv]),
        "git": git_state(REPOSITORY),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": device_names(pl_module.device, trainer.world_size),
        "data": fingerprint() if callable(fingerprint) else None,
        "slurm_job": slurm_job(),
        "resumed_from": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
    }


def progress(trainer: Trainer) -> dict[str, Any]:
    """Returns step, epoch, the last value of each metric, and the counts of read, repaired and rejected records."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    counts = getattr(getattr(trainer, "datamodule", None), "counts", {})
    return {"step": trainer.global_step, "epoch": trainer.current_epoch, "metrics": metrics, "counts": counts}


def git_state(directory: Path) -> dict[str, Any] | None:
    """Returns the commit of a checkout and whether files differ from it; None outside a checkout or without git."""
    git = shutil.which("git")
    if git is None or not (directory / ".git").exists():
        return None
    options: dict[str, Any] = {"cwd": directory, "capture_output": True, "text": True, "check": True, "timeout": 30}
    try:
        commit, status = (
            subprocess.run([git, *command], **options).stdout  # noqa: S603
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


def package_versions() -> dict[str, str]:
    """Returns the versions of the installed packages that a result depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def device_names(device: torch.device, ranks: int) -> list[str]:
    """Returns one name per rank: for GPUs of this host the product name, for a CPU its cores and threads."""
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return names[:ranks] if len(names) >= ranks else names
    if device.type == "cpu":
        return [
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        ]
    return [device.type] * ranks


def format_summary(run: Path, checkpoints: Path, config: str, record: dict[str, Any]) -> str:
    """Returns the summary at the end of a fit: the paths of the results, and the commands that use them."""
    name = "best" if (run / "adapter" / "best").is_dir() else "last"
    adapter = run / "adapter" / name
    here, python = shlex.quote(str(run)), "python main.py"
    options = "".join(f" --{key}={shlex.quote(value)}" for key, value in repeated_options(run, config).items())
    options += "".join(f" --allow_class {shlex.quote(name)}" for name in allowed_on_command_line(sys.argv))
    lines = [f"{record['state']} at step {record.get('step', 0)}: {run}"]
    if adapter.is_dir():
        lines.append(f"  adapter   {adapter}")
    if (run / REPORT_FILE).is_file():
        lines.append(f"  report    {run / REPORT_FILE}")
    if record["state"] == "interrupted" and (checkpoints / "last.ckpt").exists():
        checkpoint = shlex.quote(str(checkpoints / "last.ckpt"))
        lines.append(
            f"  resume    {python} fit --config {shlex.quote(str(run / config))} --ckpt_path {checkpoint}{options}"
        )
    lines += [
        f"  validate  {python} validate --config {shlex.quote(str(run / config))} --ckpt_path {here}{options}",
        f"  analyze   {python} analyze --model {here} --report REPORT.json --output ENRICHED.json",
        f"  export    {python} export --run {here} --output DIRECTORY --format adapter",
    ]
    return "\n".join(lines)


def allowed_on_command_line(words: Sequence[str]) -> list[str]:
    """Returns the values of ``--allow_class`` of a command line; a run's config does not store them."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [word.partition("=")[2] or after for word, after in pairs if word.partition("=")[0] == "--allow_class"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
