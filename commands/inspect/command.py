"""``python main.py inspect``: shows the data, the estimated memory and time, and probable mistakes of a run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import redirect_stdout
from typing import Any

import orjson

from commands import COMMANDS, program
from commands.config_only_cli import ConfigOnlyCLI
from commands.inspect.device import MEASURED, find_device
from commands.inspect.memory_estimate import DEVICES
from commands.inspect.plan import Plan, cache_size, epoch, find_warnings, memory_and_time
from commands.inspect.progress import ReadingProgress, progress_bar
from commands.inspect.report import Sample, print_report
from commands.inspect.tpu_compile import check_compile, check_fits, compile_run, print_compiled
from commands.options import check_minimum, parse_own_options
from datamodules.errors import UserError
from datamodules.findings import FindingsDataModule
from datamodules.redaction import redact
from datamodules.statistics.scan import scan_dataset
from datamodules.statistics.summary import DatasetSummary, report_counts
from datamodules.stream.epoch_order import epoch_order
from datamodules.tasks.base import sanitize
from datamodules.tokenization.chat_format import load_tokenizer
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.strategies.xla.aot_compile import TPUS

NEAR_DUPLICATES = 20_000  #: default number of findings that are compared with each other, in 3 s and 20 MB


def main(args: list[str]) -> None:
    """Runs ``inspect`` with its options.

    Args:
        args: the command's name and its options.

    Raises:
        UserError: an option or the config is invalid, or the sources can't be read.
    """
    options, rest = _parse(args)
    if options.device:
        find_device(options.device)
    if options.compile:
        check_compile(options.compile)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with redirect_stdout(sys.stderr):  # stdout has only the report, even if a library prints something
        cli = ConfigOnlyCLI(rest, run=False)
        sample = None
        if options.compile:
            report = compile_run(cli, options.compile)
        else:
            report, sample = inspect_run(cli, options)
    if options.format == "json":
        sys.stdout.write(orjson.dumps(sanitize(report), option=orjson.OPT_INDENT_2).decode() + "\n")
    elif options.compile:
        print_compiled(report)
    else:
        print_report(report, sample)
    if options.compile:
        check_fits(report)


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog=f"{program()} {args[0]}",
        description=COMMANDS[args[0]].summary,
        epilog="All other options are the config's, as in fit: --config FILE, --data.init_args.batch_size=4, ...",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--device", metavar="NAME", help=f"estimate for one of {', '.join(DEVICES)}, or {MEASURED}: this machine's GPU"
    )
    parser.add_argument(
        "--compile",
        metavar="TPU",
        help=f"only compile a training step for one of {', '.join(TPUS)}, without a TPU, and report its memory",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="json: one object on stdout")
    parser.add_argument("--limit", type=int, metavar="N", help="read only about N findings")
    parser.add_argument(
        "--near_duplicates",
        type=int,
        default=NEAR_DUPLICATES,
        metavar="N",
        help=f"compare the first N distinct findings with each other ({NEAR_DUPLICATES:,}; 0 for none)",
    )
    options, rest = parse_own_options(parser, args)
    check_minimum(vars(options), {"limit": 1, "near_duplicates": 0})
    return options, rest


def inspect_run(cli: ConfigOnlyCLI, options: argparse.Namespace) -> tuple[dict[str, Any], Sample | None]:
    """Reads the data and estimates the run.

    Args:
        cli: has the model and the data.
        options: ``device``, ``limit`` and ``near_duplicates``.

    Returns:
        The report as one JSON-ready object, and an example to print.

    Raises:
        UserError: the config has other classes than this project's, or the sources can't be read.
    """
    data, model, started = cli.datamodule, cli.model, time.monotonic()
    if not isinstance(data, FindingsDataModule) or not isinstance(model, CausalLMModule):
        raise UserError(
            f"inspect: the config has the classes {type(data).__name__} and {type(model).__name__}. Fix: use "
            "FindingsDataModule and CausalLMModule."
        )
    plan = Plan.of(cli.trainer_config, model.optimizer)
    summary = _read_data(data, plan, options)
    tokenizer = data.document_processor.tokenizer
    sample = Sample.of(summary.sample, load_tokenizer(tokenizer)) if summary.sample else None
    memory, cost, reason = memory_and_time(model.backbone, summary, data, plan, options.device)
    report: dict[str, Any] = {"sources": redact(data.document_processor.specs), "tokenizer": tokenizer}
    report |= report_counts(summary, data)
    report |= {
        "sample": sample.summary() if sample else None, "epoch": epoch(summary, data, plan), "memory": memory,
        "device": cost, "no_estimate": reason or None, "warnings": find_warnings(summary, data, plan, memory, cost),
        "teacher_cache": cache_size(model, summary, data), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    return report, sample


def _read_data(data: FindingsDataModule, plan: Plan, options: argparse.Namespace) -> DatasetSummary:
    data.setup("inspect")
    sources = data.document_processor.sources
    reading = ReadingProgress(sources, epoch_order(sources, epoch=0, seed=data.seed))
    with progress_bar(reading, options.limit) as show:
        return scan_dataset(
            data, devices=plan.devices, limit=options.limit, near_duplicates=options.near_duplicates, progress=show
        )
