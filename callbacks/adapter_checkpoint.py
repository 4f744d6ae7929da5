"""Adapters in PEFT's format next to the checkpoints, for ``PeftModel.from_pretrained``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.best_checkpoint import BestCheckpoint, find_best_checkpoint
from callbacks.paths import run_directory


class AdapterCheckpoint(Callback):
    """Writes ``<run>/adapter/last`` and ``<run>/adapter/best``, each with the tokenizer.

    Both correspond to the checkpoints: ``last`` is written with every checkpoint, also with that of an interrupted run,
    and once more when training ends. ``best`` is written when the saved checkpoint is the new best of the monitored
    metric. A directory is replaced as a whole, so that a reader never sees a partial one.

    The module must have ``save_adapter(path)``, which is called on all ranks and writes on rank zero. The tokenizer is
    ``trainer.datamodule.chat.tokenizer``, if there is one.
    """

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._best: BestCheckpoint | None = None
        self._written_at_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolves the run directory; called on all ranks."""
        self._directory = run_directory(trainer) / "adapter"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the best checkpoint of a resumed run, so that only a better one replaces its adapter."""
        self._best = find_best_checkpoint(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the adapters that belong to the checkpoint that is being saved.

        ``ModelCheckpoint`` sets its new best path before it saves the file, so the current weights are the best ones.
        """
        self._write(trainer, pl_module, "last")
        best = find_best_checkpoint(trainer)
        if best is not None and best != self._best:
            self._write(trainer, pl_module, "best")
            self._best = best

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the final weights if no checkpoint was saved at the last step."""
        if self._written_at_step != trainer.global_step:
            self._write(trainer, pl_module, "last")

    def _write(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        self._written_at_step = trainer.global_step
        if self._directory is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        unfinished = self._directory / f".{name}.unfinished"
        if trainer.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        pl_module.save_adapter(unfinished)  # type: ignore[operator]
        if trainer.is_global_zero:
            chat = getattr(getattr(trainer, "datamodule", None), "chat", None)
            if chat is not None:
                chat.tokenizer.save_pretrained(unfinished)
            _replace_directory(unfinished, self._directory / name)


def _replace_directory(new: Path, target: Path) -> None:
    """Replaces a directory by another; a rename alone fails if the target has content."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
