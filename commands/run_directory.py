"""Finds run folders and their checkpoints.

A fit writes ``<root>/version_N/`` with ``config.yaml``, ``run.json``, the logger's files, adapters and
``checkpoints/{last,best*}.ckpt``. The folder does not depend on the logger: a logger that writes no files, several
loggers and no logger at all have the same layout.
"""

from __future__ import annotations

import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks.preemption import slurm_job
from datamodules.errors import UserError

DEFAULT_ROOT = Path("runs")  #: root of runs if neither the logger nor ``trainer.default_root_dir`` sets one


def file_loggers(logger: Any) -> list[Namespace]:
    """Returns the loggers of a parsed config that write a folder per run, TensorBoard's and CSV, in order."""
    loggers = logger if isinstance(logger, list) else [logger]
    return [item for item in loggers if isinstance(item, Namespace) and _is_file_logger(item.get("class_path"))]


def run_root(trainer: Namespace, configured: Path | None = None) -> Path:
    """Returns the folder that contains the runs of a config.

    It is ``save_dir/name`` of the first logger that writes files (``save_dir/name/version`` if its version is given),
    else ``default_root_dir``, else the folder of the logger in the config files, so that
    ``--trainer.logger=false`` does not change the folder.

    Args:
        trainer: the parsed options of the trainer.
        configured: folder of the logger in the config files.
    """
    loggers = file_loggers(trainer.get("logger"))
    if not loggers:
        return Path(trainer.get("default_root_dir") or configured or DEFAULT_ROOT)
    arguments = loggers[0].init_args
    name, version = arguments.get("name", "lightning_logs"), arguments.get("version")
    root = Path(arguments.get("save_dir") or trainer.get("default_root_dir") or ".") / (name or "")
    return root if version is None else root / (f"version_{version}" if isinstance(version, int) else str(version))


def has_given_version(trainer: Namespace) -> bool:
    """Checks whether the config names the run folder itself, by the version of its logger."""
    loggers = file_loggers(trainer.get("logger"))
    return bool(loggers) and loggers[0].init_args.get("version") is not None


def new_run(root: Path) -> Path:
    """Returns the folder of a new run; it is not created."""
    versions = [_version(folder) for folder in root.glob("version_*")]
    return root / f"version_{max(versions, default=-1) + 1}"


def runs_below(root: Path) -> list[Path]:
    """Returns the run folders below a root, the newest first, and last the root itself if it is a run.

    A folder without a config, a record and checkpoints is not a run: an evaluation or a failed start wrote it.
    """
    folders = [folder for folder in root.glob("*") if folder.is_dir() and is_run(folder)]
    folders.sort(key=lambda folder: (_version(folder), folder.stat().st_mtime), reverse=True)
    return [*folders, root] if is_run(root) else folders


def is_run(folder: Path) -> bool:
    """Checks whether a fit wrote a folder."""
    return any((folder / name).exists() for name in ("config.yaml", "run.json", "checkpoints"))


def newest_checkpoint(root: Path, kind: str) -> Path | None:
    """Returns the last or best checkpoint of the newest run that has one.

    Args:
        root: folder of runs.
        kind: "last" or "best".

    Returns:
        The checkpoint's path, or None if no run below ``root`` has one.
    """
    return next((file for run in runs_below(root) if (file := checkpoint_of(run, kind)) is not None), None)


def checkpoint_of(run: Path, kind: str) -> Path | None:
    """Returns the last or best checkpoint of a run folder, or None.

    Args:
        run: run folder.
        kind: "last" or "best"; without a best checkpoint (validation never ran) "best" is the last one.
    """
    patterns = ("best*.ckpt", "last*.ckpt") if kind == "best" else ("last*.ckpt",)
    for pattern in patterns:
        files = sorted((run / "checkpoints").glob(pattern), key=lambda file: file.stat().st_mtime)
        if files:
            return files[-1]
    return None


def requeued_checkpoint(root: Path) -> Path | None:
    """Returns the last checkpoint of the unfinished run that this SLURM job started before it was requeued, or None."""
    job = slurm_job()
    if job is None or not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return None
    for run in runs_below(root):
        try:
            record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if record.get("slurm_job") == job:
            return None if record.get("state") == "finished" else checkpoint_of(run, "last")
    return None


def run_of(checkpoint: Path) -> Path:
    """Returns the run folder of a checkpoint."""
    return checkpoint.resolve().parent.parent


def resolve_checkpoint(ckpt_path: str | None, root: Path) -> Path | None:
    """Resolves the value of ``--ckpt_path`` to a file.

    Args:
        ckpt_path: a file, a run folder, ``last`` or ``best``; None for no checkpoint. The words mean the newest run: an
            older one is never used in place of a newest run without a checkpoint.
        root: folder of runs.

    Raises:
        UserError: there is no such checkpoint.
    """
    if ckpt_path is None:
        return None
    if ckpt_path in ("last", "best"):
        return _newest_runs_checkpoint(ckpt_path, root)
    path = Path(ckpt_path)
    if path.is_dir():
        checkpoint = checkpoint_of(path, "best")
        if checkpoint is None:
            raise UserError(
                f"--ckpt_path {ckpt_path}: a folder without checkpoints/*.ckpt. Fix: give a run folder or a file."
            )
        return checkpoint
    if not path.is_file():
        raise UserError(f"--ckpt_path {ckpt_path}: no such file. Fix: `last` uses the newest run below {root}.")
    return path


def _newest_runs_checkpoint(word: str, root: Path) -> Path:
    runs = runs_below(root)
    checkpoint = checkpoint_of(runs[0], word) if runs else None
    if checkpoint is not None:
        return checkpoint
    older = newest_checkpoint(root, word)
    if older is not None:
        raise UserError(
            f"--ckpt_path {word}: the newest run {runs[0]} was stopped before its first checkpoint. Fix: leave the "
            f"option out to start a new run, or continue an older run with --ckpt_path {older}"
        )
    raise UserError(
        f"--ckpt_path {word}: no run below {root} has a checkpoint. Fix: leave the option out to start a "
        "new run, or give a file."
    )


def _is_file_logger(class_path: str | None) -> bool:
    module, _, name = (class_path or "").rpartition(".")
    try:
        logger = getattr(import_module(module), name, None) if module else None
    except ImportError:
        return False
    return isinstance(logger, type) and issubclass(logger, (TensorBoardLogger, CSVLogger))


def _version(run: Path) -> int:
    match = re.fullmatch(r"version_(\d+)", run.name)
    return int(match[1]) if match else -1
