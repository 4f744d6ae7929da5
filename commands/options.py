"""Option parsing that several commands share.

The commands whose options are the arguments of one function are parsed by jsonargparse, like the configs. ``inspect``
and ``cache-teacher`` pass the options that they don't know on to the config. They use argparse for their own options,
because jsonargparse has no ``parse_known_args``: it raises NotImplementedError, so that a typing error is not ignored.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import jsonargparse

from commands import COMMANDS, program
from datamodules.errors import UserError, one_line


def parse_function_options(
    args: list[str],
    function: Callable[..., Any],
    flags: Mapping[str, str] | None = None,
    lists: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Parses the options that are the arguments of a function.

    Args:
        args: the command's name and its options. ``--batch-size`` is read as ``--batch_size``.
        function: its signature and docstring define the options.
        flags: help texts of boolean arguments that may be given without a value (``--overwrite`` for
            ``--overwrite=true``), by name.
        lists: help texts of required arguments that take one or more texts (``--report a.json b.json``), by name.

    Returns:
        The function's keyword arguments.

    Raises:
        UserError: an option is unknown, missing or has a wrong type.
    """
    command, flags, lists = args[0], flags or {}, lists or {}
    summary = COMMANDS[command].summary
    parser = jsonargparse.ArgumentParser(prog=f"{program()} {command}", exit_on_error=False, description=summary)
    parser.add_function_arguments(function, skip={*flags, *lists})
    for name, text in flags.items():
        parser.add_argument(f"--{name}", type=bool, nargs="?", const=True, default=False, help=text)
    for name, text in lists.items():
        parser.add_argument(f"--{name}", type=str, nargs="+", action="extend", required=True, help=text)
    try:
        options = parser.parse_args([with_underscores(argument) for argument in args[1:]])
    except jsonargparse.ArgumentError as error:
        problem = one_line(error, 600)
        raise UserError(f"{command}: {problem}. Fix: see the options in `{program()} {command} --help`.") from error
    return dict(options.as_dict())


def parse_own_options(parser: argparse.ArgumentParser, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the options of a command that passes the other options on to the config.

    Args:
        parser: has the command's own options.
        args: the command's name and its options.

    Returns:
        The command's own options, and the rest of the command line.

    Raises:
        UserError: an option of the command has a wrong value.
    """
    try:
        return parser.parse_known_args(args[1:])
    except argparse.ArgumentError as error:
        raise UserError(f"{args[0]}: {error}. Fix: see the options in `{program()} {args[0]} --help`.") from error


def check_minimum(options: Mapping[str, float | None], minimum: Mapping[str, float]) -> None:
    """Raises an error if an option is too small.

    Args:
        options: values by name; None is not checked.
        minimum: smallest value of each option that is checked.

    Raises:
        UserError: a value is below its minimum.
    """
    for name, least in minimum.items():
        value = options[name]
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: too small. Fix: give at least {least}.")


def with_underscores(argument: str) -> str:
    """Returns an option's name with underscores: ``--batch-size=4`` becomes ``--batch_size=4``."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument
