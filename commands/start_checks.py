"""Checks before a fit, an evaluation or its data starts: what Lightning would refuse after the first steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from datamodules.errors import UserError, one_line
from datamodules.findings import FindingsDataModule
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.models.backend import check_precision, check_sharding

MESSAGE_LIMIT = 600  #: largest number of characters of a message of Lightning
OWN_PACKAGES = ("callbacks", "commands", "lightning")  #: their callbacks log no metric that could be monitored
#: options that are a share of an epoch if they are a fraction
EPOCH_SHARES = ("val_check_interval", "limit_train_batches", "limit_val_batches", "limit_test_batches")


def check_trainer(trainer: Trainer, module: LightningModule, data: Any) -> None:
    """Checks the trainer's settings and callbacks against model and data, before anything is opened.

    Raises:
        UserError: a setting is one that fails later.
    """
    backbone = getattr(module, "backbone", None)
    if backbone is not None:
        check_precision(trainer.precision_plugin, backbone.dtype)
        check_sharding(trainer.strategy, backbone.quantization)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise UserError(
                f"trainer.callbacks={type(callback).__name__}: it copies the whole model, and checkpoints hold trained "
                "tensors only. Fix: remove it"
            )
    if isinstance(data, FindingsDataModule):
        _check_epoch_shares(trainer)
    if isinstance(module, CausalLMModule):
        _check_monitors(trainer, module, data)


def _check_epoch_shares(trainer: Trainer) -> None:
    """Refuses shares of an epoch: the data are streamed, so its length is unknown."""
    for option in EPOCH_SHARES:
        value = getattr(trainer, option)
        if isinstance(value, float) and value not in (0.0, 1.0):
            raise UserError(
                f"trainer.{option}={value}: a share of an epoch, and the data are streamed, so its length is unknown. "
                "Fix: give a number of batches, for example 100"
            )


def _check_monitors(trainer: Trainer, module: CausalLMModule, data: Any) -> None:
    """Refuses a monitored metric that the run does not log. Callbacks of the user may log others."""
    names = module.objective.sum_names
    if names is None or any(_package(callback) not in OWN_PACKAGES for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return
    means = ["token_accuracy" if name == "correct" else name for name in names]
    training = [*(f"train/{name}" for name in means), "train/grad_norm", "lr"]
    validation = [f"val/{name}" for name in means]
    validates = bool(trainer.limit_val_batches) and bool(getattr(data, "val_fraction", 1.0))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, (ModelCheckpoint, EarlyStopping)) or callback.monitor is None:
            continue
        name, metric = type(callback).__name__, callback.monitor
        logged = [*training, *validation, *(("step", "epoch") if isinstance(callback, ModelCheckpoint) else ())]
        if metric not in logged:
            raise UserError(
                f"trainer.callbacks: {name}.monitor={metric}: the run logs no such metric. "
                f"Fix: use one of {', '.join(logged)}"
            )
        if metric in validation and not validates and isinstance(callback, EarlyStopping):
            raise UserError(
                f"trainer.callbacks: {name}.monitor={metric}: the run has no validation. Fix: set "
                "data.init_args.val_fraction and trainer.limit_val_batches above 0, or remove the callback"
            )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Converts errors that Lightning raises about the configuration into errors of the user on one line.

    These are its ``MisconfigurationException``, and other errors that are raised in its own code and not in code that
    it calls: numbers of tasks and devices under SLURM, loaders and loops.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"trainer: {one_line(error, MESSAGE_LIMIT)}") from error
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        if _raised_in_lightning(error):
            raise UserError(f"trainer: {one_line(error, MESSAGE_LIMIT)}") from error
        raise


def _raised_in_lightning(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and _root(str(traceback.tb_frame.f_globals.get("__name__"))) == "lightning"


def _package(callback: Any) -> str:
    return _root(type(callback).__module__)


def _root(name: str) -> str:
    return name.partition(".")[0]
