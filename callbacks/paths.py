"""Where a run keeps its files: ``<run>/checkpoints/*.ckpt`` and ``<run>/adapter/{last,best}/``."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def run_folder(trainer: Trainer) -> Path:
    """The logger's folder of this run, or the trainer's default root without a logger.

    Every rank must call it: Lightning broadcasts rank zero's answer.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def checkpoint_folder(trainer: Trainer, run: Path) -> Path:
    """The folder of the first ``ModelCheckpoint`` that has one, else ``checkpoints`` in the run folder."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath)
    return run / "checkpoints"
