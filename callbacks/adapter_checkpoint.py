"""Adapters in PEFT's format beside the checkpoints, ready for ``PeftModel.from_pretrained``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.paths import run_folder


class AdapterCheckpoint(Callback):
    """Writes ``<run>/adapter/last`` and ``<run>/adapter/best``, each with the tokenizer.

    Both follow the checkpoints: ``last`` is written with every checkpoint that is saved (an interrupted run's too) and
    once more when training ends, ``best`` when the saved checkpoint is the monitored metric's new best. A folder is
    replaced as a whole, so that a reader never finds half of one.

    The module needs ``save_adapter(path)``, which is called on every rank and writes on rank zero; the tokenizer is
    ``trainer.datamodule.chat.tokenizer``, if there is one.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._best: Any = None
        self._written_at: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the run folder, on every rank."""
        self._folder = run_folder(trainer) / "adapter"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the best checkpoint of the run that is resumed, so that only a better one replaces it."""
        self._best = _best_checkpoint(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the adapters of a checkpoint that is being saved.

        ``ModelCheckpoint`` names its new best before it saves it, so these are the best's weights.
        """
        self._write(trainer, pl_module, "last")
        best = _best_checkpoint(trainer)
        if best is not None and best != self._best:
            self._write(trainer, pl_module, "best")
            self._best = best

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the final weights, where no checkpoint was saved at the last step."""
        if self._written_at != trainer.global_step:
            self._write(trainer, pl_module, "last")

    def _write(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        self._written_at = trainer.global_step
        if self._folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        unfinished = self._folder / f".{name}.unfinished"
        if trainer.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        pl_module.save_adapter(unfinished)  # type: ignore[operator]
        if trainer.is_global_zero:
            chat = getattr(getattr(trainer, "datamodule", None), "chat", None)
            if chat is not None:
                chat.tokenizer.save_pretrained(unfinished)
            _replace(unfinished, self._folder / name)


def _best_checkpoint(trainer: Trainer) -> tuple[str, float] | None:
    """Path and score of the best checkpoint so far, None where no metric is monitored or none was seen."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path and callback.best_model_score is not None:
            return callback.best_model_path, float(callback.best_model_score)
    return None


def _replace(new: Path, target: Path) -> None:
    """Puts a folder in another's place; a folder can't be renamed over one with content."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
