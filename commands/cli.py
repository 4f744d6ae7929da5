"""The LightningCLI of this project: which classes a config may name, and how errors reach the user."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from commands.config_merge import DEFAULT_CONFIG, compose
from commands.run_directory import newest_checkpoint, resolve_checkpoint, run_of
from datamodules.errors import UserError
from lightning_modules.models.backend import check_sharding

TRAINER_COMMANDS = ("fit", "validate", "test")
#: warnings that say nothing to a user of this program
NOISE = (
    r".*overridden `transfer_batch_to_device` in `LightningModule`.*",  # meant: the model plans its attention there
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 with torch 2.13
    r".*is_gradient_checkpointing.*",  # PEFT 0.21 with transformers 5.23
    r".*does not have many workers.*",  # row building is far faster than a step
)


class FinetuneCLI(LightningCLI):
    """LightningCLI with one tokenizer for model and data, resumable run folders and one-line errors.

    Args:
        args: the command line without the program's name; its ``--config`` files are merged by
            :func:`commands.config_merge.compose`, and ``configs/default.yaml`` stands in where there is none.
        run: True runs the subcommand that ``args`` begins with; False only builds model, data and trainer.
    """

    def __init__(self, args: list[str], run: bool = True) -> None:
        head, tail = (args[:1], args[1:]) if run else ([], args)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},  # a resumed run writes into its own folder again
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False}
            | {command: {"exit_on_error": False} for command in (TRAINER_COMMANDS if run else ())},
            args=[*head, *compose(tail, DEFAULT_CONFIG)],
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer methods that are subcommands, with the arguments that the CLI fills in itself."""
        every = LightningCLI.subcommands()
        return {command: every[command] for command in TRAINER_COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data is tokenised with the tokenizer of the model that is trained, so it is named once."""
        parser.link_arguments("model.init_args.backbone.model_name_or_path", "data.init_args.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; a broken key or class becomes a :class:`UserError` of one line."""
        try:
            self.config = parser.parse_args(args)
        except (ArgumentError, TypeError, ValueError) as error:
            raise UserError(one_line(error)) from error

    def _parse_ckpt_path(self) -> None:
        """Keeps the config as written: Lightning would merge the checkpoint's hyperparameters over it."""

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint that ``--ckpt_path last|best`` means, and goes on in its run folder."""
        if self.config.get("subcommand") is None:
            return
        config = self.config[self.config.subcommand]
        root = self._run_root(config)
        checkpoint = resolve_checkpoint(config.get("ckpt_path"), root)
        if checkpoint is None and self.config.subcommand != "fit":
            checkpoint = newest_checkpoint(root, "best")
            found = (
                f"the newest run's checkpoint {checkpoint}" if checkpoint else f"the untuned model: no run below {root}"
            )
            print(f"{self.config.subcommand}: {found}", flush=True)
        config["ckpt_path"] = str(checkpoint) if checkpoint else None
        config["weights_only"] = True
        if config.trainer.get("logger") is False:
            _leave_out_monitors(config.trainer)
        if checkpoint is not None and run_of(checkpoint).parent == root.resolve():
            config.trainer.logger.init_args.version = run_of(checkpoint).name

    def instantiate_classes(self) -> None:
        """Builds the classes; what their constructors refuse becomes a :class:`UserError` of one line."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise UserError(one_line(error)) from error
        backbone = getattr(self.model, "backbone", None)
        check_sharding(getattr(self.trainer, "strategy", None), getattr(backbone, "quantization", "none"))

    @staticmethod
    def _run_root(config: Namespace) -> Path:
        logger = config.trainer.get("logger")
        if isinstance(logger, Namespace):
            arguments = logger.init_args
            return Path(arguments.save_dir) / (arguments.name or "")
        return Path(config.trainer.get("default_root_dir") or Path.cwd())


def _leave_out_monitors(trainer: Namespace) -> None:
    """Without a logger Lightning's LearningRateMonitor would end the fit at its first step."""
    callbacks = trainer.get("callbacks") or []
    kept = [callback for callback in callbacks if not callback.class_path.endswith(".LearningRateMonitor")]
    if len(kept) < len(callbacks):
        print("trainer.logger false: LearningRateMonitor, which writes to a logger, is left out", flush=True)
        trainer.callbacks = kept


def one_line(error: BaseException) -> str:
    """Folds an exception's message into one line, the deepest cause that says most first."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:597] + "..."


def trainer_command(args: list[str]) -> None:
    """Runs ``fit``, ``validate`` or ``test``; a signal ends it by ``SystemExit`` with 128 + its number."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork after the tokenizer was used
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA warns at each compilation that GSPMD will be replaced
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertising)
    FinetuneCLI(args)


def _no_advertising(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()
