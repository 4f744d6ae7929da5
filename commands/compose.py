"""Puts config files together without the leak that jsonargparse has.

Given two files that name different classes for one slot, jsonargparse keeps those ``init_args`` of the first class that
the second accepts too: Lion would run with AdamW's betas (https://github.com/omni-us/jsonargparse/issues/460). Here
a later class replaces the earlier one with all its arguments, whether it comes from a file or from the command line;
arguments of the same class are merged. ``key+: [...]`` in a later file appends to a list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import UserError

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "default.yaml"


def compose(args: list[str], default: Path | None = None) -> list[str]:
    """Replaces every ``--config FILE`` by one ``--config`` that holds their merged content.

    Args:
        args: command line after the subcommand.
        default: the config that runs when no ``--config`` is given; never merged underneath another.

    Returns:
        The command line with at most one ``--config``, which comes first.

    Raises:
        UserError: a file that is missing, or is no YAML mapping.
    """
    files, rest = split_config_arguments(args)
    if not files and default is not None:
        files = [str(default)]
    if not files:
        return rest
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, load_config(file))
    for key, value in _class_overrides(rest):
        _forget_other_class(merged, key.split("."), value)
    return ["--config", yaml.safe_dump(merged, sort_keys=False), *rest]


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


def _class_overrides(args: list[str]) -> list[tuple[str, str]]:
    """All ``--a.b.class_path=X`` and ``--a.b=X`` of a command line as ("a.b", "X")."""
    pairs = []
    for position, argument in enumerate(args):
        if not argument.startswith("--"):
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = args[position + 1] if position + 1 < len(args) else ""
        pairs.append((key.removesuffix(".class_path"), value))
    return pairs


def _forget_other_class(config: dict[str, Any], path: list[str], class_path: str) -> None:
    """Drops a slot's ``init_args`` where the command line names another class for it."""
    slot: Any = config
    parent: Any = None
    for key in path:
        if not isinstance(slot, dict) or key not in slot:
            return
        parent, slot = slot, slot[key]
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
