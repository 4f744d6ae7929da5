"""``python main.py synthesize``: writes synthetic findings for training and tests, in the scanner's archive format."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from commands import program
from commands.options import parse_function_options
from datamodules.errors import UserError
from datamodules.synthetic import ARCHIVE_SUFFIXES, REPORT_NAME, Layout, SynthesisReport, check_arguments, synthesize

FLAGS = {  # may be given without a value: --overwrite or --overwrite=true
    "plain": "write plain JSON documents instead of the archive's envelopes",
    "overwrite": "replace existing shards",
}


def main(args: list[str]) -> None:
    """Runs ``synthesize`` with its options.

    Args:
        args: the command's name and its options.

    Raises:
        UserError: an option is unknown, missing or out of its range.
    """
    synthesize_command(**parse_function_options(args, synthesize_command, FLAGS))


def synthesize_command(
    findings: int,
    output: str,
    seed: int = 0,
    plain: bool = False,
    layout: str = "batch",
    findings_per_shard: int = 5000,
    overwrite: bool = False,
) -> None:
    """Writes synthetic findings whose answers follow from their content.

    Args:
        findings: number of findings.
        output: a folder, or an archive if it ends in .tar.gz or .tgz.
        seed: seed of the random generator; the same seed gives the same bytes.
        plain: write plain JSON documents instead of the archive's envelopes (hex of gzip of JSON).
        layout: batch, or ground_truth (adds summaries and actions).
        findings_per_shard: findings in one file.
        overwrite: replace existing shards.

    Raises:
        UserError: an argument is out of its range, or ``output`` exists.
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
        raise UserError(f"--output {output}: {error.strerror or error}. Fix: choose a writable folder.") from error
    console.print(_summary(report), soft_wrap=True, highlight=False, markup=False)


def _clear(target: Path, overwrite: bool) -> None:
    """Prepares the output path; of an existing folder only files that this command writes are removed."""
    if target.name.endswith(ARCHIVE_SUFFIXES):
        if target.is_dir():
            raise UserError(f"--output {target}: this is a folder. Fix: choose another name for the archive.")
        if target.exists() and not overwrite:
            raise UserError(f"--output {target}: the file exists. Fix: add --overwrite or choose another name.")
    elif target.exists() and not target.is_dir():
        raise UserError(f"--output {target}: this is a file. Fix: name a folder, or an archive that ends in .tar.gz.")
    elif target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"--output {target}: not empty. Fix: add --overwrite or choose another folder.")
        for path in [*target.glob("batch_*.json"), target / REPORT_NAME]:
            path.unlink(missing_ok=True)


def _summary(report: SynthesisReport) -> str:
    rate = report.findings / max(report.seconds, 1e-9)
    sources = shlex.quote(json.dumps([os.fspath(report.output)]))  # a JSON list, which can contain any path
    command = f"{program()} fit --data.init_args.sources={sources}"
    return (
        f"{report.findings:,} findings, {report.correlations:,} correlations, {report.shards:,} shards, "
        f"{decimal(report.bytes)} in {report.seconds:.1f} s ({rate:,.0f} findings/s): {report.output}\n"
        f"Train on it: {command}"
    )
