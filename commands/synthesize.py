"""``python main.py synthesize``: writes findings to train and test on, in the archive's wire format."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import cast

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from datamodules.errors import UserError
from datamodules.synthetic import ARCHIVE_SUFFIXES, REPORT_NAME, Layout, SynthesisReport, check_arguments, synthesize

FLAGS = {  # --overwrite alone, or --overwrite=true
    "plain": "write plain JSON documents instead of the archive's envelopes",
    "overwrite": "replace shards that are there already",
}


def main(args: list[str]) -> None:
    """Runs ``synthesize`` with its options; ``args`` begins with the command's name.

    Raises:
        UserError: an option is unknown, missing or out of its range.
    """
    parser = ArgumentParser(prog="main.py synthesize", exit_on_error=False, description=__doc__)
    parser.add_function_arguments(synthesize_command, skip=set(FLAGS))
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", type=bool, nargs="?", const=True, default=False, help=text)
    try:
        options = parser.parse_args(args[1:])
    except ArgumentError as error:
        raise UserError(f"synthesize: {' '.join(str(error).split())}; see python main.py synthesize --help") from error
    synthesize_command(**options.as_dict())


def synthesize_command(
    findings: int,
    output: str,
    seed: int = 0,
    plain: bool = False,
    layout: str = "batch",
    findings_per_shard: int = 5000,
    overwrite: bool = False,
) -> None:
    """Writes synthetic findings whose answers follow from what they say.

    Args:
        findings: how many to write.
        output: a folder, or an archive where it ends in .tar.gz or .tgz.
        seed: the same seed gives the same bytes.
        plain: write plain JSON documents instead of the archive's envelopes (hex of gzip of JSON).
        layout: batch, or ground_truth (adds summaries and actions).
        findings_per_shard: findings in one file.
        overwrite: replace shards that are there already.

    Raises:
        UserError: an argument is out of its range, or there is something at ``output``.
    """
    check_arguments(findings, seed, layout, findings_per_shard)
    target = Path(output)
    _clear(target, overwrite)
    console = Console()
    columns = (TextColumn("synthesize"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("findings", total=findings)
            report = synthesize(
                target,
                findings=findings,
                seed=seed,
                envelope=not plain,
                layout=cast("Layout", layout),
                findings_per_shard=findings_per_shard,
                progress=lambda done: bar.update(task, completed=done),
            )
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}; choose a place that can be written") from error
    console.print(_summary(report), soft_wrap=True, highlight=False, markup=False)


def _clear(target: Path, overwrite: bool) -> None:
    """Makes room for the output: of a folder only what this command writes is ever removed."""
    if target.name.endswith(ARCHIVE_SUFFIXES):
        if target.is_dir():
            raise UserError(f"--output {target} is a folder: choose another name for the archive")
        if target.exists() and not overwrite:
            raise UserError(f"--output {target} exists: add --overwrite or choose another name")
    elif target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file: name a folder, or an archive that ends in .tar.gz")
    elif target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"--output {target} is not empty: add --overwrite or choose another folder")
        for path in [*target.glob("batch_*.json"), target / REPORT_NAME]:
            path.unlink(missing_ok=True)


def _summary(report: SynthesisReport) -> str:
    rate = report.findings / max(report.seconds, 1e-9)
    sources = shlex.quote(json.dumps([os.fspath(report.output)]))  # a list in JSON: any path survives
    command = f"python main.py fit --data.init_args.sources={sources}"
    return (
        f"{report.findings:,} findings, {report.correlations:,} correlations, {report.shards:,} shards, "
        f"{decimal(report.bytes)} in {report.seconds:.1f} s ({rate:,.0f} findings/s): {report.output}\n"
        f"Train on it: {command}"
    )
