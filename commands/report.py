"""``python main.py report``: writes the report of a run, one HTML file, from the files in its folder."""

from __future__ import annotations

from pathlib import Path

from callbacks.reporting.html_report import EVALUATIONS, write_report
from commands.options import parse_function_options
from datamodules.errors import UserError


def main(args: list[str]) -> int:
    """Runs ``report`` with its options.

    Args:
        args: the command's name and its options.

    Returns:
        The exit status 0.

    Raises:
        UserError: an option is unknown or missing, or the folder is no run folder.
    """
    return report(**parse_function_options(args, report))


def report(run: str) -> int:
    """Writes ``report.html`` into a run folder; after ``validate`` or ``test`` it has their tables too.

    Args:
        run: run folder.

    Raises:
        UserError: the folder has no file of a run, or the report can't be written.
    """
    folder = Path(run).expanduser()
    if not any((folder / name).is_file() for name in ("run.json", *EVALUATIONS)):
        raise UserError(f"--run {run}: no run.json or evaluation.json. Fix: give a run folder (runs/NAME/version_N).")
    try:
        print(write_report(folder))
    except OSError as error:
        raise UserError(f"--run {run}: {error.strerror or error}. Fix: make the folder writable.") from error
    return 0
