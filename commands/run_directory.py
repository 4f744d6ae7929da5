"""Finds run folders and their checkpoints.

A fit writes ``<root>/version_N/`` with ``config.yaml``, ``run.json``, TensorBoard's events, adapters and
``checkpoints/{last,best*}.ckpt``. Without a logger the root itself is the only run folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from datamodules.errors import UserError


def newest_checkpoint(root: Path, kind: str) -> Path | None:
    """Returns the last or best checkpoint of the newest run that has one.

    Args:
        root: folder of runs: ``save_dir/name`` of the TensorBoard logger; without a logger the trainer's default root.
        kind: "last" or "best".

    Returns:
        The checkpoint's path, or None if no run below ``root`` has one.
    """
    for run in (*sorted(root.glob("version_*"), key=_version, reverse=True), root):
        checkpoint = checkpoint_of(run, kind)
        if checkpoint is not None:
            return checkpoint
    return None


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


def run_of(checkpoint: Path) -> Path:
    """Returns the run folder of a checkpoint."""
    return checkpoint.resolve().parent.parent


def resolve_checkpoint(ckpt_path: str | None, root: Path) -> Path | None:
    """Resolves the value of ``--ckpt_path`` to a file.

    Args:
        ckpt_path: a file, a run folder, ``last`` or ``best``; None for no checkpoint.
        root: folder of runs.

    Raises:
        UserError: there is no such checkpoint.
    """
    if ckpt_path is None:
        return None
    if ckpt_path in ("last", "best"):
        checkpoint = newest_checkpoint(root, ckpt_path)
        if checkpoint is None:
            raise UserError(
                f"--ckpt_path {ckpt_path}: no run below {root} has a checkpoint. Fix: leave the option out to start a "
                "new run, or give a file."
            )
        return checkpoint
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


def _version(run: Path) -> int:
    match = re.fullmatch(r"version_(\d+)", run.name)
    return int(match[1]) if match else -1
