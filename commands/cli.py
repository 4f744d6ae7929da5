"""LightningCLI of the commands fit, validate and test: builds the classes of a config, with errors on one line."""

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
from datamodules.errors import UserError, one_line
from datamodules.redaction import is_secret_name, redact
from lightning_modules.models.backend import check_sharding

TRAINER_COMMANDS = ("fit", "validate", "test")
MESSAGE_LIMIT = 600  #: largest number of characters of an error message of jsonargparse or Lightning
#: regular expressions of warnings that are irrelevant to users of this program
IGNORED_WARNINGS = (
    r".*overridden `transfer_batch_to_device` in `LightningModule`.*",  # intended: prepares masks
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 with torch 2.13
    r".*is_gradient_checkpointing.*",  # PEFT 0.21 with transformers 5.23
    r".*does not have many workers.*",  # building rows is much faster than a training step
)


class RedactingParser(LightningArgumentParser):
    """Parser whose output has no secrets: the ``config.yaml`` of a run, and ``--print_config``."""

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """Returns a config as text, with :data:`~datamodules.redaction.MASK` for each secret."""
        return super().dump(_without_secrets(cfg), *args, **kwargs)


class FinetuneCLI(LightningCLI):
    """LightningCLI with one tokenizer for model and data, resumable run folders and one-line errors.

    Args:
        args: the command line without the program's name; its ``--config`` files are merged by
            :func:`commands.config_merge.compose`, and ``configs/default.yaml`` is used if there is none.
        run: True runs the subcommand that is the first of ``args``; False only builds model, data and trainer.
    """

    def __init__(self, args: list[str], run: bool = True) -> None:
        head, tail = (args[:1], args[1:]) if run else ([], args)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=RedactingParser,
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
        """Returns the Trainer methods that are subcommands, with the arguments that the CLI fills in itself."""
        every = LightningCLI.subcommands()
        return {command: every[command] for command in TRAINER_COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links the data's tokenizer to the model: the data is tokenised with the tokenizer of the trained model."""
        parser.link_arguments("model.init_args.backbone.model_name_or_path", "data.init_args.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the config; raises :class:`UserError` for an unknown key or class."""
        try:
            self.config = parser.parse_args(args)
        except (ArgumentError, TypeError, ValueError) as error:
            raise UserError(one_line(error, MESSAGE_LIMIT)) from error

    def _parse_ckpt_path(self) -> None:
        """Does nothing, so that the config is used as written.

        Lightning's private method reads the hyperparameters that a checkpoint stores and merges them over the config: a
        resumed run would ignore changed options. Lightning 2.6 has no public option to turn this off; this method is
        the only override of a private one.
        """

    def before_instantiate_classes(self) -> None:
        """Resolves ``--ckpt_path last|best`` to a file, and continues in its run folder."""
        if self.config.get("subcommand") is None:
            return
        config = self.config[self.config.subcommand]
        root = self._run_root(config)
        checkpoint = resolve_checkpoint(config.get("ckpt_path"), root)
        if checkpoint is None and self.config.subcommand != "fit":
            checkpoint = newest_checkpoint(root, "best")
            evaluated = (
                f"the newest run's checkpoint {checkpoint}" if checkpoint else f"the untuned model: no run below {root}"
            )
            print(f"{self.config.subcommand}: {evaluated}", flush=True)
        config["ckpt_path"] = str(checkpoint) if checkpoint else None
        config["weights_only"] = True
        if config.trainer.get("logger") is False:
            _remove_learning_rate_monitor(config.trainer)
        if checkpoint is not None and run_of(checkpoint).parent == root.resolve():
            config.trainer.logger.init_args.version = run_of(checkpoint).name

    def instantiate_classes(self) -> None:
        """Builds the classes; raises :class:`UserError` if a constructor rejects its arguments."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise UserError(one_line(error, MESSAGE_LIMIT)) from error
        backbone = getattr(self.model, "backbone", None)
        check_sharding(getattr(self.trainer, "strategy", None), getattr(backbone, "quantization", "none"))

    @staticmethod
    def _run_root(config: Namespace) -> Path:
        logger = config.trainer.get("logger")
        if isinstance(logger, Namespace):
            arguments = logger.init_args
            return Path(arguments.save_dir) / (arguments.name or "")
        return Path(config.trainer.get("default_root_dir") or Path.cwd())


def _without_secrets(value: Any) -> Any:
    """Returns a copy of a parsed config in which secrets are masked."""
    if isinstance(value, Namespace):
        copy = value.clone()
        for key, item in vars(value).items():
            copy[key] = redact({key: item})[key] if is_secret_name(key) else _without_secrets(item)
        return copy
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return redact(value) if isinstance(value, (dict, str)) else value


def _remove_learning_rate_monitor(trainer: Namespace) -> None:
    """Removes Lightning's LearningRateMonitor: without a logger it raises an error at the start of a fit."""
    callbacks = trainer.get("callbacks") or []
    kept = [callback for callback in callbacks if not callback.class_path.endswith(".LearningRateMonitor")]
    if len(kept) < len(callbacks):
        print("trainer.logger false: LearningRateMonitor, which writes to a logger, is left out", flush=True)
        trainer.callbacks = kept


def trainer_command(args: list[str]) -> None:
    """Runs ``fit``, ``validate`` or ``test``.

    Args:
        args: the command's name and its options.

    Raises:
        UserError: the config is invalid.
        SystemExit: a signal stopped the run; the status is 128 + the signal's number.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer was used
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA warns at each compilation that GSPMD will be replaced
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    FinetuneCLI(args)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()
