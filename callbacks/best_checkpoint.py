"""Lookup of the best checkpoint of a run, and temporary use of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(NamedTuple):
    """Best checkpoint so far.

    Attributes:
        path: checkpoint file. ``ModelCheckpoint`` sets it before the file is saved.
        score: value of the monitored metric.
    """

    path: Path
    score: float


def find_best_checkpoint(trainer: Trainer) -> BestCheckpoint | None:
    """Returns the best checkpoint so far; None if no metric is monitored or it has no value yet."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path and callback.best_model_score is not None:
            return BestCheckpoint(Path(callback.best_model_path), float(callback.best_model_score))
    return None


@contextmanager
def best_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[dict[str, Any]]:
    """Replaces the trainable weights by those of the best checkpoint inside a ``with`` block.

    The weights of the last step are kept if there is no best checkpoint, or if it was saved at the last step.

    Args:
        trainer: holds the checkpoint callbacks and the strategy.
        pl_module: module with the trainable parameters.

    Yields:
        The ``step`` of the weights and, for a checkpoint's weights, ``checkpoint``, its file name.
    """
    best = find_best_checkpoint(trainer)
    if best is None or not best.path.is_file():
        yield {"step": trainer.global_step}
        return
    checkpoint = torch.load(best.path, map_location="cpu", weights_only=True)
    about = {"step": checkpoint["global_step"], "checkpoint": best.path.name}
    if about["step"] == trainer.global_step:
        yield about
        return
    trained = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
    last = {name: parameter.detach().clone() for name, parameter in trained.items()}
    try:  # through the strategy, because it may have sharded the weights
        trainer.strategy.load_model_state_dict(checkpoint, strict=False)
        yield about
    finally:
        trainer.strategy.load_model_state_dict({"state_dict": last}, strict=False)
