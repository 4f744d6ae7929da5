"""Command-line interface: the table of subcommands, and the exit status of each.

No heavy package is imported here, so that ``python main.py --help`` answers at once: the module of a subcommand is
imported when the subcommand runs.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from commands.output_protection import protect_output, shown
from datamodules.errors import UserError

__version__ = "0.1.0"

PROGRAM = "sys-scan-finetune"  #: name of the package and of its console script
PACKAGES = ("torch", "lightning", "transformers", "peft")  #: packages whose versions ``--version`` prints


class Command(NamedTuple):
    """One subcommand.

    Attributes:
        module: module that is imported when the command runs.
        function: its function of the arguments, of which the first is the command's name; returns the exit status, or
            None for 0.
        summary: one line for the help.
    """

    module: str
    function: str
    summary: str


COMMANDS = {
    "fit": Command("commands.cli", "trainer_command", "fine-tune; without --config, configs/default.yaml"),
    "validate": Command("commands.cli", "trainer_command", "evaluate the newest run, or --ckpt_path, on held-out data"),
    "test": Command("commands.cli", "trainer_command", "evaluate on the test split"),
    "analyze": Command(
        "commands.analyze.command", "main", "score, correlate and summarise a scanner report with a trained model"
    ),
    "export": Command(
        "commands.export.command", "main", "write a run's model for PEFT, transformers or llama.cpp, with a certificate"
    ),
    "report": Command("commands.report", "main", "write a run as one HTML file: settings, curves, tables, samples"),
    "inspect": Command("commands.inspect.command", "main", "show the data and the estimated cost of a run, before it"),
    "cache-teacher": Command(
        "commands.cache_teacher.command", "main", "write the predictions of a frozen teacher, for fits without it"
    ),
    "synthesize": Command("commands.synthesize", "main", "write findings in the scanner's format"),
}


def main(args: list[str] | None = None) -> int:
    """Runs one subcommand; also the entry point of the console script.

    Args:
        args: the command line without the program's name; None for ``sys.argv``.

    Returns:
        The exit status: 0 on success, 2 on a user error (printed to stderr as one line), else the subcommand's own.
        A fit that is stopped by signal n ends with ``SystemExit`` and status 128 + n.
    """
    protect_output()
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(version_text())
        return 0
    disable_hub_kernels()
    try:
        if args[0] not in COMMANDS:
            raise UserError(f"{args[0]}: no such command. Fix: give one of {', '.join(COMMANDS)}.")
        command = COMMANDS[args[0]]
        return int(getattr(import_module(command.module), command.function)(args) or 0)
    except UserError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return 2


def program() -> str:
    """Returns the words that start this program, for help texts and hints."""
    return PROGRAM if Path(sys.argv[0]).stem == PROGRAM else "python main.py"


def usage() -> str:
    """Returns the help text: the list of subcommands."""
    head = f"usage: {program()} COMMAND [options]      (COMMAND --help lists them)\n"
    rows = [f"  {name:<13} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([head, *rows, "  --version     print the versions of this program and of its main packages"])


def version_text() -> str:
    """Returns the versions of this program, of Python and of the main packages, without importing the packages."""
    packages = [f"{name} {_installed_version(name)}" for name in PACKAGES]
    return f"{PROGRAM} {__version__}\n" + ", ".join([f"python {platform.python_version()}", *packages])


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def disable_hub_kernels() -> None:
    """Keeps libraries from downloading code from the Hugging Face hub through the package ``kernels``.

    transformers has a public switch, the environment variable ``USE_HUB_KERNELS``. bitsandbytes has none: when it is
    imported on a CPU with AVX512-BF16 and ``kernels`` is installed, it calls ``kernels.get_kernel``, which downloads
    and runs code. A None in ``sys.modules`` makes ``import kernels`` fail, which bitsandbytes handles as "not
    installed"; it then warns that the package should be installed, so that this warning is turned off too.
    """
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
