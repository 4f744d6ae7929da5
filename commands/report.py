"""``python main.py report``: a run as one HTML file, made again from what lies in its folder."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from callbacks.reporting.html_report import EVALUATIONS, write_report
from commands.cli import one_line
from datamodules.errors import UserError


def main(args: list[str]) -> int:
    """Runs ``report`` with its options; ``args`` begins with the command's name.

    Raises:
        UserError: an option is unknown or missing, or the folder is no run's.
    """
    parser = ArgumentParser(prog="main.py report", exit_on_error=False, description=__doc__)
    parser.add_function_arguments(report)
    try:
        options = parser.parse_args(args[1:])
    except ArgumentError as error:
        raise UserError(f"report: {one_line(error)}; see python main.py report --help") from error
    return report(**options.as_dict())


def report(run: str) -> int:
    """Writes ``report.html`` into a run folder; after ``validate`` or ``test`` it holds their tables too.

    Args:
        run: run folder.

    Raises:
        UserError: nothing of a run lies there, or it can't be written.
    """
    folder = Path(run).expanduser()
    if not any((folder / name).is_file() for name in ("run.json", *EVALUATIONS)):
        raise UserError(f"--run {run}: no run.json or evaluation.json there; give a run folder (runs/NAME/version_N)")
    try:
        print(write_report(folder))
    except OSError as error:
        raise UserError(f"--run {run}: {error.strerror or error}") from error
    return 0
