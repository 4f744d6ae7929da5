"""Puts config files together without the leak that jsonargparse has.

Given two files that name different classes for one slot, jsonargparse keeps those ``init_args`` of the first class that
the second accepts too: Lion would run with AdamW's betas (https://github.com/omni-us/jsonargparse/issues/460). Here
a later class replaces the earlier one with all its arguments, whether it comes from a file or from the command line;
arguments of the same class are merged. ``key+: [...]`` in a later file appends to a list.

Two more things that jsonargparse misreads are put right: ``null`` for an argument within a class's arguments (it hands
on the word None), and a class path for an option that also takes a name (``trainer.strategy`` would look for a strategy
of that name).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import UserError

NAME_OR_CLASS = ("trainer.strategy", "trainer.accelerator")
DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "default.yaml"


def compose(args: list[str], default: Path | None = None) -> list[str]:
    """Replaces every ``--config FILE`` by one ``--config`` that holds their merged content.

    Args:
        args: command line after the subcommand.
        default: the config that runs when no ``--config`` is given; never merged underneath another.

    Returns:
        The command line with at most one ``--config``, which comes first and holds what the command line sets to null.

    Raises:
        UserError: a file that is missing, or is no YAML mapping; a null for an argument of what is no class.
    """
    files, rest = split_config_arguments(args)
    if not files and default is not None:
        files = [str(default)]
    if not files:
        return rest
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, load_config(file))
    kept: list[str] = []
    for key, value, words in _options(rest):
        path = key.removesuffix(".class_path").split(".")
        if value in ("null", "~"):
            _set_null(merged, path)
            continue
        _forget_other_class(merged, path, value)
        if key in NAME_OR_CLASS and re.fullmatch(r"[\w.]+\.[A-Z]\w*", value):
            words = [f"--{key}.class_path={value}"]
        kept += words
    return ["--config", yaml.safe_dump(merged, sort_keys=False), *kept]


def split_config_arguments(args: list[str]) -> tuple[list[str], list[str]]:
    """Tells ``--config``/``-c`` arguments from the rest: (files, rest)."""
    files, rest, position = [], [], 0
    while position < len(args):
        argument = args[position]
        if argument in ("--config", "-c"):
            if position + 1 == len(args):
                raise UserError(f"{argument} needs a file: for example `--config configs/gpu.yaml`")
            files.append(args[position + 1])
            position += 1
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
        position += 1
    return files, rest


def load_config(file: str) -> dict[str, Any]:
    """Reads one YAML mapping.

    Raises:
        UserError: there is no such file, it does not parse, or it is no mapping.
    """
    path = Path(file)
    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in DEFAULT_CONFIG.parent.glob("*.yaml")))
        raise UserError(f"--config {file}: no such file; configs/ has {shipped}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {file}: expected a mapping with keys like `model:` and `data:`, got {content!r:.60}")
    return content


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Merges two configs; a slot whose ``class_path`` changes is replaced whole."""
    if "class_path" in base and "class_path" in update and base["class_path"] != update["class_path"]:
        return update
    merged = dict(base)
    for key, value in update.items():
        if key.endswith("+") and isinstance(value, list):
            merged[key[:-1]] = [*(merged.get(key[:-1]) or []), *value]
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _options(args: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """The options of a command line: (key, value, the words that they are); "" for no value, or where it is none."""
    position = 0
    while position < len(args):
        words = args[position : position + 1]
        key, equals, value = words[0].partition("=")
        if not equals and key.startswith("--") and not "".join(args[position + 1 : position + 2]).startswith("--"):
            words = args[position : position + 2]
            value = "".join(words[1:])
        yield key.removeprefix("--") if key.startswith("--") else "", value, words
        position += len(words)


def _arguments(slot: dict[str, Any], key: str) -> dict[str, Any]:
    """Where a key of a slot is: in a class's ``init_args`` if the command line leaves that word out."""
    inside = "class_path" in slot and key not in ("class_path", "init_args", "dict_kwargs")
    return slot.setdefault("init_args", {}) if inside else slot


def _set_null(config: dict[str, Any], path: list[str]) -> None:
    """Sets a key to null, whatever class was there.

    Raises:
        UserError: on the way to it is something that has no keys.
    """
    slot: Any = config
    for number, key in enumerate(path, start=1):
        if not isinstance(slot, dict):
            raise UserError(f"--{'.'.join(path)}=null: {'.'.join(path[: number - 1])} is {slot!r}, which has no {key}")
        slot = _arguments(slot, key)
        if number == len(path):
            slot[key] = None
        slot = slot.setdefault(key, {})


def _forget_other_class(config: dict[str, Any], path: list[str], class_path: str) -> None:
    """Drops a slot's ``init_args`` where the command line names another class for it."""
    slot: Any = config
    parent: Any = None
    for key in path:
        parent = _arguments(slot, key) if isinstance(slot, dict) else {}
        if key not in parent:
            return
        slot = parent[key]
    if (
        isinstance(slot, dict)
        and "class_path" in slot
        and slot["class_path"].split(".")[-1] != class_path.split(".")[-1]
    ):
        if "." not in class_path and not class_path[:1].isupper():  # accelerator: a class there, "cpu" here
            del parent[path[-1]]
            return
        slot.clear()
        slot["class_path"] = class_path
