"""Run folders: where a fit leaves its config, curves, checkpoints and adapters, and how a later command finds them.

``<root>/version_N/`` holds ``config.yaml``, ``run.json``, TensorBoard's events and ``checkpoints/{last,best*}.ckpt``;
without a logger the root itself is the one run.
"""

from __future__ import annotations

import re
from pathlib import Path

from datamodules.errors import UserError


def newest_checkpoint(root: Path, kind: str) -> Path | None:
    """Finds the last or best checkpoint of the newest run that has one.

    Args:
        root: folder of runs, ``save_dir/name`` of the TensorBoard logger; without one the trainer's default root.
        kind: "last" or "best".

    Returns:
        The checkpoint's path, or None where no run below ``root`` has one.
    """
    for run in (*sorted(root.glob("version_*"), key=_version, reverse=True), root):
        found = checkpoint_of(run, kind)
        if found is not None:
            return found
    return None


def checkpoint_of(run: Path, kind: str) -> Path | None:
    """The last or best checkpoint of one run folder; "best" falls back to "last" where validation never ran."""
    patterns = ("best*.ckpt", "last*.ckpt") if kind == "best" else ("last*.ckpt",)
    for pattern in patterns:
        files = sorted((run / "checkpoints").glob(pattern), key=lambda file: file.stat().st_mtime)
        if files:
            return files[-1]
    return None


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return checkpoint.resolve().parent.parent


def resolve_checkpoint(ckpt_path: str | None, root: Path) -> Path | None:
    """Turns ``--ckpt_path`` (a path, a run folder, ``last`` or ``best``) into a file.

    Raises:
        UserError: nothing is there; the message says what is.
    """
    if ckpt_path is None:
        return None
    if ckpt_path in ("last", "best"):
        found = newest_checkpoint(root, ckpt_path)
        if found is None:
            raise UserError(
                f"--ckpt_path {ckpt_path}: no run below {root} has a checkpoint yet; leave the option out to start "
                "anew, or give the file"
            )
        return found
    path = Path(ckpt_path)
    if path.is_dir():
        found = checkpoint_of(path, "best")
        if found is None:
            raise UserError(
                f"--ckpt_path {ckpt_path}: a folder without checkpoints/*.ckpt; give a run folder or a file"
            )
        return found
    if not path.is_file():
        raise UserError(f"--ckpt_path {ckpt_path}: no such file; `last` takes the newest run below {root}")
    return path


def _version(run: Path) -> int:
    match = re.fullmatch(r"version_(\d+)", run.name)
    return int(match[1]) if match else -1
