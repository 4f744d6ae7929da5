"""Directories of a run: ``<run>/checkpoints/*.ckpt`` and ``<run>/adapter/{last,best}/``."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_directory(trainer: Trainer) -> Path:
    """Returns the directory of the first logger that writes one per run, or else the trainer's default root.

    Loggers such as MLFlow's and Comet's have no directory of their own for a run. Must be called on all ranks, because
    the path of rank zero is broadcast: another rank may find another number for a new run.
    """
    directory = trainer.default_root_dir
    for logger in trainer.loggers:
        if isinstance(logger, (TensorBoardLogger, CSVLogger)):
            directory = logger.log_dir
            break
    return Path(trainer.strategy.broadcast(directory))


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
