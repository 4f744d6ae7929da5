"""Checks config files before their classes are imported, and fills in the secrets that a run's config leaves out.

The command line belongs to the user, a file may come from somebody else: a class path, a callable or a path on the
command line is used as given. A file may name only the classes of :mod:`lightning_modules.allowed_classes` and those
of ``--allow_class``. The config of a run may write only to the folder of runs that contains it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from callbacks.run_config import foreign_paths, is_run_config
from datamodules.errors import UserError, one_line
from datamodules.redaction import masked_places
from lightning_modules.allowed_classes import file_content, import_paths, is_allowed

ALLOW_CLASS = "--allow_class"
MAX_NESTED_FILES = 20  #: largest number of further files that a config may name


def split_allowed_classes(args: list[str]) -> tuple[list[str], list[str]]:
    """Separates the ``--allow_class`` options of a command line.

    Returns:
        The values, and the other arguments.

    Raises:
        UserError: an option has no value, or one that is no import path.
    """
    values, rest, words = [], [], iter(args)
    for word in words:
        if word == ALLOW_CLASS:
            values.append(next(words, ""))
        elif word.startswith(f"{ALLOW_CLASS}="):
            values.append(word.partition("=")[2])
        else:
            rest.append(word)
    for value in values:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", value):
            raise UserError(f"{ALLOW_CLASS} {one_line(value)!r}: no import path. Fix: give a class or a package.")
    return values, rest


def check_classes(file: str, content: Any, allowed: Collection[str], depth: int = 0) -> None:
    """Refuses a config file that would import other classes or functions than the allowed ones.

    Args:
        file: name of the file, for the message.
        content: its content.
        allowed: values of ``--allow_class``.
        depth: number of files that led to this one.

    Raises:
        UserError: the file names a class or a function that is not allowed.
    """
    for place, path in import_paths(content):
        nested = file_content(path)
        if nested is not None:
            if depth == MAX_NESTED_FILES:
                raise UserError(f"--config {file}: {place}={one_line(path)}: too many nested files. Fix: use one file.")
            check_classes(path, nested, allowed, depth + 1)
        elif not is_allowed(path, allowed):
            raise UserError(
                f"--config {file}: {place}={one_line(path)}: this class or function is not on the list of allowed "
                f"ones, and importing it runs its code. Fix: if you trust it, add {ALLOW_CLASS} {one_line(path)}"
            )


def check_write_paths(file: str, content: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuses a run's config that would write to other places than the run's own folder.

    Args:
        file: the config file; one that was not written by a fit is not checked.
        content: its content.
        given: keys that the command line sets, as :func:`without_init_args` returns them.

    Raises:
        UserError: a path is outside of the run, and the command line does not give it.
    """
    path = Path(file)
    if not is_run_config(path):
        return
    for key, value in foreign_paths(content, path.parent):
        if _is_given(key, given):
            continue
        indexed = any(part.isdigit() for part in key.split("."))
        fix = "copy the file out of the run folder and read it" if indexed else f"confirm it by --{key}={value}"
        raise UserError(
            f"--config {file}: {key}={one_line(value)}: the config of a run can't choose a path outside of the run to "
            f"write to. Fix: {one_line(fix, 400)}"
        )


def fill_secrets(config: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Returns a config with the secrets that were masked when it was written, from environment variables.

    Args:
        config: a merged config.
        given: keys that the command line sets, as :func:`without_init_args` returns them.

    Raises:
        UserError: a secret is neither in the environment nor on the command line.
    """
    for place, value in masked_places(config):
        if _is_given(place, given):
            continue
        variable = secret_variable(place)
        if not os.environ.get(variable):
            raise UserError(
                f"{place}={one_line(value)}: secrets are not stored in a run's config. Fix: set the environment "
                f"variable {variable} to the whole value (or give --{place}=VALUE, which other users of this machine "
                "can see)"
            )
        config = _with_value(config, place.split("."), os.environ[variable])
    return config


def secret_variable(place: str) -> str:
    """Returns the environment variable of a masked value: ``SYS_SCAN_DATA_STORAGE_OPTIONS_SECRET`` for example."""
    return "SYS_SCAN_" + re.sub(r"\W", "_", without_init_args(place)).upper()


def without_init_args(key: str) -> str:
    """Returns a dotted key without ``init_args``, which the command line may leave out."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def _is_given(key: str, given: Collection[str]) -> bool:
    parts = without_init_args(key).split(".")
    return any(".".join(parts[:length]) in given for length in range(1, len(parts) + 1))


def _with_value(tree: Any, path: list[str], value: str) -> Any:
    if not path:
        return value
    if isinstance(tree, list):
        return [_with_value(item, path[1:], value) if str(i) == path[0] else item for i, item in enumerate(tree)]
    # a key of the user's own may contain a dot
    key = next(k for k in tree if path[: k.count(".") + 1] == k.split("."))
    return tree | {key: _with_value(tree[key], path[key.count(".") + 1 :], value)}
