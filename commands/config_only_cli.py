"""Builds the model and the data of a config without a trainer, for commands that only look at a run."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from commands.cli import FinetuneCLI


class ConfigOnlyCLI(FinetuneCLI):
    """Builds the model and the data of a config on any machine: no trainer, logger, callback or weights.

    Attributes:
        trainer_config: the trainer's part of the config, as written.
    """

    trainer_config: Namespace

    def before_instantiate_classes(self) -> None:
        """Keeps the trainer's settings in ``trainer_config`` and removes what this machine may not be able to build."""
        self.trainer_config = self.config.trainer.clone()
        removed = {"accelerator": "auto", "strategy": "auto", "plugins": None, "callbacks": None, "logger": False}
        self.config.trainer.update(Namespace(**removed))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Returns None: a trainer would look for the accelerator of the run."""
        return None
