"""Directories of a run: ``<run>/checkpoints/*.ckpt`` and ``<run>/adapter/{last,best}/``."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def run_directory(trainer: Trainer) -> Path:
    """Returns the logger's directory of this run, or the trainer's default root without a logger.

    Must be called on all ranks, because Lightning broadcasts the path of rank zero.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def checkpoint_directory(trainer: Trainer, run: Path) -> Path:
    """Returns the directory of the first ``ModelCheckpoint`` that has one, else ``checkpoints`` in the run directory.

    Args:
        trainer: holds the checkpoint callbacks.
        run: run directory.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath)
    return run / "checkpoints"
