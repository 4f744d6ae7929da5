"""LightningCLI of the commands fit, validate and test: builds the classes of a config, with errors on one line."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from commands.config_merge import DEFAULT_CONFIG, compose, configured
from commands.run_directory import (  # fmt: skip
    file_loggers,
    has_given_version,
    new_run,
    newest_checkpoint,
    requeued_checkpoint,
    resolve_checkpoint,
    run_of,
    run_root,
    runs_below,
)
from commands.run_folder import RunFolder, keep_file, new_run_folder
from commands.start_checks import MESSAGE_LIMIT, check_trainer, one_line_errors
from datamodules.errors import UserError, one_line
from datamodules.redaction import is_secret_name, redact

TRAINER_COMMANDS = ("fit", "validate", "test")
#: regular expressions of warnings that are irrelevant to users of this program
IGNORED_WARNINGS = (
    r".*overridden `transfer_batch_to_device` in `LightningModule`.*",  # intended: prepares masks
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 with torch 2.13
    r".*is_gradient_checkpointing.*",  # PEFT 0.21 with transformers 5.23
    r".*Checkpoint directory .* exists and is not empty.*",  # of a resumed run
    r".*Experiment logs directory .* exists and is not empty.*",  # the CSV metrics of earlier starts are kept
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
        args = [*head, *compose(tail, DEFAULT_CONFIG)]
        self._configured_root = _file_logger_root(configured(tail, DEFAULT_CONFIG).get("trainer"))
        self._evaluated = ""
        self._new_run: Path | None = None
        self._recorded_config = Namespace()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=RedactingParser,
            save_config_callback=RunFolder,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False}
            | {command: {"exit_on_error": False} for command in (TRAINER_COMMANDS if run else ())},
            args=args,
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
        """Resolves the run folder and ``--ckpt_path``; a resumed fit continues in the run folder of its checkpoint."""
        if self.config.get("subcommand") is None:
            return
        config = self.config[self.config.subcommand]
        config["weights_only"] = True
        if config.trainer.get("logger") in (False, []):
            _remove_learning_rate_monitor(config.trainer)
        self._recorded_config = config.clone()  # without the folder of this run, so that it starts a new one again
        self._recorded_config["ckpt_path"] = None
        root = run_root(config.trainer, self._configured_root)
        checkpoint = self._checkpoint(config.get("ckpt_path"), root)
        config["ckpt_path"] = str(checkpoint) if checkpoint else None
        run = root if has_given_version(config.trainer) else _run_folder(root, checkpoint)
        self._new_run = None if run.exists() else run
        _set_run(config.trainer, run)

    def _checkpoint(self, ckpt_path: str | None, root: Path) -> Path | None:
        """Returns the checkpoint that the command starts from, and prints one that the user did not name."""
        command = self.config.subcommand
        checkpoint = resolve_checkpoint(ckpt_path, root)
        if checkpoint is not None:
            return checkpoint
        if command == "fit":
            checkpoint = requeued_checkpoint(root)
            if checkpoint is not None:
                print(f"fit: SLURM requeued the job; it resumes from {checkpoint}", flush=True)
            return checkpoint
        checkpoint, runs = newest_checkpoint(root, "best"), runs_below(root)
        if checkpoint is None:
            self._evaluated = f"the untuned model: no run below {root}" + (" has a checkpoint" if runs else "")
        elif runs[0].resolve() == run_of(checkpoint):
            self._evaluated = f"the newest run's checkpoint {checkpoint}"
        else:
            self._evaluated = f"an older run's checkpoint {checkpoint}: the newest run {runs[0]} has none"
        print(f"{command}: {self._evaluated}", flush=True)
        return checkpoint

    def fit(self, **kwargs: Any) -> None:
        """Runs ``Trainer.fit``; a start that fails before its first step leaves no folder."""
        new = self._new_run if not self.trainer.fast_dev_run else None  # type: ignore[attr-defined]
        for logger in self.trainer.loggers:
            if isinstance(logger, CSVLogger) and self.trainer.is_global_zero:  # it would delete them
                keep_file(Path(logger.log_dir) / "metrics.csv")
        with one_line_errors(), new_run_folder(self.trainer, new) if new else nullcontext():
            self.trainer.fit(**kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Runs ``Trainer.validate``."""
        with one_line_errors():
            self.trainer.validate(**kwargs)

    def test(self, **kwargs: Any) -> None:
        """Runs ``Trainer.test``."""
        with one_line_errors():
            self.trainer.test(**kwargs)

    def after_validate(self) -> None:
        """Prints again at the end which model was evaluated, if the user did not name it."""
        if self._evaluated:
            print(f"{self.config.subcommand}: evaluated {self._evaluated}", flush=True)

    def after_test(self) -> None:
        """Does the same as :meth:`after_validate`."""
        self.after_validate()

    def instantiate_classes(self) -> None:
        """Builds the classes; raises :class:`UserError` if a constructor rejects its arguments."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise UserError(one_line(error, MESSAGE_LIMIT)) from error
        if self.trainer is None:  # a command that runs no trainer
            return
        check_trainer(self.trainer, self.model, self.datamodule)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder) and self._recorded_config:  # empty without a subcommand
                callback.config = self._recorded_config
            if isinstance(callback, ModelCheckpoint) and self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                callback.save_last = False  # Lightning skips all checkpoints of fast_dev_run but this one


def _run_folder(root: Path, checkpoint: Path | None) -> Path:
    """Returns the run folder of a checkpoint below the root of runs, else the folder of a new run."""
    if checkpoint is not None:
        run = run_of(checkpoint)
        if run == root.resolve():
            return root
        if run.parent == root.resolve():
            return root / run.name
    return new_run(root)


def _set_run(trainer: Namespace, run: Path) -> None:
    """Sets the folder that the trainer and its loggers write to, so that nothing is written outside of it."""
    trainer.default_root_dir = str(run)
    for logger in file_loggers(trainer.get("logger")):
        if logger.init_args.get("version") is None:
            logger.init_args.version = run.name


def _file_logger_root(trainer: Any) -> Path | None:
    """Returns the folder of runs that the logger in the config files sets, or None."""
    logger = trainer.get("logger") if isinstance(trainer, dict) else None
    arguments = logger.get("init_args") if isinstance(logger, dict) else None
    if not isinstance(arguments, dict) or not arguments.get("save_dir"):
        return None
    return Path(arguments["save_dir"]) / (arguments.get("name") or "")


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
