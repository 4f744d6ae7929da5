"""Writes the config of a fit into its run folder, at the first step, and keeps what earlier starts wrote."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from callbacks.paths import run_directory
from datamodules.errors import UserError
from datamodules.redaction import redact_text
from lightning_modules.resumed_settings import differences

CHECKPOINT_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


class RunFolder(SaveConfigCallback):
    """Saves ``config.yaml`` at the first step of a fit, and keeps all files of the run in its folder.

    - A start that fails before the end of its first batch leaves no folder; see :func:`new_run_folder`.
    - A resumed run keeps the config of its earlier starts as ``config-1.yaml``, ``config-2.yaml``, and CSVLogger's
      ``metrics.csv`` in the same way.
    - Checkpoints are written to ``<run>/checkpoints`` whatever logger is used, and ``last.ckpt`` is always the newest
      one: Lightning would add ``last-v1.ckpt`` after a resume from another file or with a moved folder.
    - An evaluation writes no config.
    """

    began = False  #: whether the first batch is done
    _run: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolves the run folder and sets the folder of the checkpoints; called on all ranks."""
        if stage != "fit":
            return
        self._run = run_directory(trainer)
        for callback in _checkpoint_callbacks(trainer):
            callback.dirpath = callback.dirpath or str(self._run.resolve() / "checkpoints")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replaces the stored folder of the checkpoints if the run's folder was moved or is given in another form."""
        if self._run is None or trainer.ckpt_path is None:
            return
        folder = Path(trainer.ckpt_path).resolve().parent
        if folder != self._run.resolve() / "checkpoints":
            return
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and Path(state.get("dirpath") or "").name == folder.name:
                _move_paths(state, folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets ``last.ckpt`` be replaced by the next checkpoint."""
        for callback in _checkpoint_callbacks(trainer):
            last = Path(callback.dirpath or "") / "last.ckpt"
            if callback.save_last and last.exists():
                callback.last_model_path = str(last)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Saves the config before the first batch."""
        if self._run is None or self.already_saved:
            return
        if trainer.is_global_zero:
            self._run.mkdir(parents=True, exist_ok=True)
            text = self.parser.dump(self.config, skip_none=False)
            file = self._run / self.config_filename
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                _print_changes(keep_file(file), text)
                file.write_text(text, encoding="utf-8")
        self.already_saved = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Keeps the folder after the first batch."""
        self.began = True


@contextmanager
def new_run_folder(trainer: Trainer, run: Path) -> Iterator[None]:
    """Creates the folder of a new run inside a ``with`` block, and removes it if the fit fails before its first step.

    The number of a run is reserved by the folder: two fits that start at the same time get different ones.

    Args:
        trainer: the trainer of the fit; its rank zero creates the folder.
        run: folder that did not exist when the command was parsed.

    Raises:
        UserError: another fit created it since.
    """
    if trainer.is_global_zero:
        try:
            run.mkdir(parents=True)
            (run / "checkpoints").mkdir()  # makes it a run: `last` does not mean an older one if this process is killed
        except FileExistsError as error:
            raise UserError(
                f"trainer.logger: another fit that started at the same time has the run folder {run}. "
                "Fix: run the command again; it takes the next number"
            ) from error
    try:
        yield
    except BaseException:
        began = any(callback.began for callback in trainer.callbacks if isinstance(callback, RunFolder))  # type: ignore[attr-defined]
        if trainer.is_global_zero and not began:
            for logger in trainer.loggers:
                logger.finalize("failed")
            shutil.rmtree(run, ignore_errors=True)
        raise


def _checkpoint_callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _print_changes(kept: Path | None, text: str) -> None:
    """Prints the settings of trainer and data that differ from an earlier start; the module prints its own."""
    if kept is None:
        return
    before, after = (_plain_config(config) for config in (kept.read_text(encoding="utf-8"), text))
    changed = [line for name in ("trainer", "data") for line in differences(before.get(name), after.get(name), name)]
    if changed:
        rank_zero_info(redact_text(f"resume: {', '.join(changed)}; {kept.name} has the earlier configuration"))


def _plain_config(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def keep_file(file: Path) -> Path | None:
    """Renames a file of an earlier start to the first free name with a number; returns its new path."""
    if not file.exists():
        return None
    number = 1
    while (kept := file.with_name(f"{file.stem}-{number}{file.suffix}")).exists():
        number += 1
    return file.rename(kept)


def _move_paths(state: dict[str, Any], folder: Path) -> None:
    """Changes the folder in the stored state of a ModelCheckpoint."""
    state["dirpath"] = str(folder)
    for name in CHECKPOINT_PATHS:
        if state.get(name):
            state[name] = str(folder / Path(state[name]).name)
    best = state.get("best_k_models") or {}
    state["best_k_models"] = {str(folder / Path(path).name): score for path, score in best.items()}
