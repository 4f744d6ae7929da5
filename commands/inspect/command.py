"""``python main.py inspect``: what a run would be given, what it would cost, and what looks wrong, before it starts."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import redirect_stdout
from typing import Any

import orjson
from jsonargparse import Namespace

from commands.cli import FinetuneCLI
from commands.inspect.device import MEASURED, find_device
from commands.inspect.memory_estimate import DEVICES
from commands.inspect.plan import Plan, cache_size, epoch, find_warnings, memory_and_time
from commands.inspect.progress import Meter, progress_bar
from commands.inspect.report import Sample, print_report
from commands.inspect.tpu_compile import check_compile, check_fits, compile_run, print_compiled
from datamodules.errors import UserError
from datamodules.findings import FindingsDataModule
from datamodules.statistics.scan import scan_dataset
from datamodules.statistics.summary import DatasetSummary, report_counts
from datamodules.stream.epoch_order import epoch_order
from datamodules.tokenization.chat_format import load_tokenizer
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.strategies.xla.aot_compile import TPUS

NEAR_DUPLICATES = 20_000  #: findings that are compared with each other, unless the option says how many: 3 s, 20 MB


class InspectCLI(FinetuneCLI):
    """Builds model and data of a config, on any machine: no trainer, no logger, no callback, no weights.

    Attributes:
        trainer_config: the trainer's part as it was written.
    """

    trainer_config: Namespace

    def before_instantiate_classes(self) -> None:
        """Sets the trainer's parts aside."""
        self.trainer_config = self.config.trainer.clone()
        nothing = {"accelerator": "auto", "strategy": "auto", "plugins": None, "callbacks": None, "logger": False}
        self.config.trainer.update(Namespace(**nothing))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Makes none: it would look for the accelerator that the run is meant for."""
        return None


def main(args: list[str]) -> None:
    """Runs ``inspect`` with its options; ``args`` begins with the command's name.

    Raises:
        UserError: an option or the config can't be served, or the sources can't be read.
    """
    options, rest = _parse(args[1:])
    if options.device:
        find_device(options.device)
    if options.compile:
        check_compile(options.compile)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with redirect_stdout(sys.stderr):  # stdout is the report's, whatever a library prints
        cli = InspectCLI(rest, run=False)
        sample = None
        if options.compile:
            report = compile_run(cli, options.compile)
        else:
            report, sample = inspect_run(cli, options)
    if options.format == "json":
        sys.stdout.write(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode() + "\n")
    elif options.compile:
        print_compiled(report)
    else:
        print_report(report, sample)
    if options.compile:
        check_fits(report)


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="main.py inspect",
        description=__doc__,
        epilog="Every other option is the config's, as in fit: --config FILE, --data.init_args.batch_size=4, ...",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--device", metavar="NAME", help=f"estimate for one of {', '.join(DEVICES)}, or {MEASURED}: this machine's GPU"
    )
    parser.add_argument(
        "--compile",
        metavar="TPU",
        help=f"only have the TPU's compiler say what a step needs on one of {', '.join(TPUS)}, without a TPU",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="json: one object on stdout")
    parser.add_argument("--limit", type=int, metavar="N", help="read only about so many findings")
    parser.add_argument(
        "--near_duplicates",
        type=int,
        default=NEAR_DUPLICATES,
        metavar="N",
        help=f"compare the first N distinct findings with each other ({NEAR_DUPLICATES:,}; 0 for none)",
    )
    try:
        options, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UserError(f"inspect: {error}") from error
    for name in ("limit", "near_duplicates"):
        value = getattr(options, name)
        if value is not None and value < (name == "limit"):
            raise UserError(f"inspect: --{name} {value} is too small; give a positive number")
    return options, rest


def inspect_run(cli: InspectCLI, options: argparse.Namespace) -> tuple[dict[str, Any], Sample | None]:
    """Surveys the data and estimates the run.

    Args:
        cli: holds model and data.
        options: ``device``, ``limit`` and ``near_duplicates``.

    Returns:
        The report as one JSON-ready object, and an example to show.

    Raises:
        UserError: the config's classes are not this project's, or the sources can't be read.
    """
    data, model, began = cli.datamodule, cli.model, time.monotonic()
    if not isinstance(data, FindingsDataModule) or not isinstance(model, CausalLMModule):
        raise UserError(
            f"inspect reads configs of FindingsDataModule and CausalLMModule, not of {type(data).__name__} and "
            f"{type(model).__name__}"
        )
    plan = Plan.of(cli.trainer_config, model.optimizer)
    found = _survey(data, plan, options)
    sample = Sample.of(found.sample, load_tokenizer(data.document_processor.tokenizer)) if found.sample else None
    memory, cost, reason = memory_and_time(model.backbone, found, data, plan, options.device)
    report: dict[str, Any] = {"sources": data.document_processor.specs, "tokenizer": data.document_processor.tokenizer}
    report |= report_counts(found, data)
    report |= {
        "sample": sample.summary() if sample else None, "epoch": epoch(found, data, plan), "memory": memory,
        "device": cost, "no_estimate": reason or None, "warnings": find_warnings(found, data, plan, memory, cost),
        "teacher_cache": cache_size(model, found, data), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    return report, sample


def _survey(data: FindingsDataModule, plan: Plan, options: argparse.Namespace) -> DatasetSummary:
    data.setup("inspect")
    sources = data.document_processor.sources
    meter = Meter(sources, epoch_order(sources, epoch=0, seed=data.seed))
    with progress_bar(meter, options.limit) as show:
        return scan_dataset(
            data, devices=plan.devices, limit=options.limit, near_duplicates=options.near_duplicates, progress=show
        )
