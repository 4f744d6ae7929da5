"""Merges config files, and works around errors of jsonargparse.

- If two files give different classes for one key, jsonargparse keeps those ``init_args`` of the first class that the
  second accepts too: Lion would run with AdamW's betas (https://github.com/omni-us/jsonargparse/issues/460). Here a
  later class replaces the earlier one with all its arguments, whether it comes from a file or from the command line;
  arguments of the same class are merged. ``key+: [...]`` in a later file appends to a list.
- ``null`` for an argument within a class's arguments: jsonargparse passes the string "None".
- One key of a mapping of data (``--data.init_args.task_weights.triage=2``): jsonargparse removes the other keys.
- A class path for an option that also accepts a name: for ``trainer.strategy`` Lightning would look for a registered
  strategy of that name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from commands.config_safety import (
    check_classes,
    check_write_paths,
    fill_secrets,
    split_allowed_classes,
    without_init_args,
)
from datamodules.errors import UserError, one_line
from datamodules.redaction import redact, redact_text, remember_secrets
from lightning_modules.allowed_classes import PLAIN_KEYS, file_content

NAME_OR_CLASS = ("trainer.strategy", "trainer.accelerator")  #: options that accept a name or a class path
#: options whose value is a mapping of data, each with the default of its class
PLAIN_MAPPINGS: dict[str, dict[str, Any]] = {"task_weights": {"risk": 1.0}, "storage_options": {}}
#: the package ``configs`` is next to this package, in a checkout as well as when installed
CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULT_CONFIG = CONFIGS / "default.yaml"


def compose(args: list[str], default: Path | None = None) -> list[str]:
    """Replaces every ``--config FILE`` by one ``--config`` with the merged content of the files.

    Args:
        args: command line after the subcommand.
        default: the config that is used if no ``--config`` is given; it is never merged with another one.

    Returns:
        The command line with at most one ``--config``, which comes first. Values that the command line sets to null are
        part of it. Secrets that a run's config leaves out are filled in from the environment.

    Raises:
        UserError: a file is missing or is no YAML mapping, names a class or a path that it may not name (see
            :mod:`commands.config_safety`), or lacks a secret; or the command line sets an argument of a plain value to
            null.
    """
    allowed, args = split_allowed_classes(args)
    files, rest = split_config_arguments(args)
    for key, value, _ in _options(rest):
        remember_secrets({key: _yaml_or_text(value)})
        # a class path on the command line is the user's, the content of a file may be somebody else's
        if key.rpartition(".")[2] not in PLAIN_KEYS and isinstance(content := file_content(value), dict):
            check_classes(value, content, allowed)
    if not files and default is not None:
        files = [str(default)]
    if not files:
        return rest
    given = {without_init_args(key) for key, _, _ in _options(rest) if key}
    merged: dict[str, Any] = {}
    for file in files:
        content = load_config(file)
        check_classes(file, content, allowed)
        check_write_paths(file, content, given)
        merged = merge(merged, content)
    merged = fill_secrets(merged, given)
    remember_secrets(merged)
    kept: list[str] = []
    for key, value, words in _options(rest):
        path = key.removesuffix(".class_path").split(".")
        if value in ("null", "~"):
            _set_null(merged, path)
            continue
        if _add_to_mapping(merged, path, value):
            continue
        _forget_other_class(merged, path, value)
        if key in NAME_OR_CLASS and re.fullmatch(r"[\w.]+\.[A-Z]\w*", value):
            words = [f"--{key}.class_path={value}"]
        kept += words
    return ["--config", yaml.safe_dump(merged, sort_keys=False), *kept]


def configured(args: list[str], default: Path | None = None) -> dict[str, Any]:
    """Returns the merged content of the ``--config`` files of a command line; the default config's if there is none.

    Raises:
        UserError: a file is missing or is no YAML mapping.
    """
    files = split_config_arguments(args)[0]
    if not files and default is not None:
        files = [str(default)]
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, load_config(file))
    return merged


def split_config_arguments(args: list[str]) -> tuple[list[str], list[str]]:
    """Separates the ``--config``/``-c`` arguments of a command line: (files, rest)."""
    files, rest, position = [], [], 0
    while position < len(args):
        argument = args[position]
        if argument in ("--config", "-c"):
            if position + 1 == len(args):
                raise UserError(f"{argument}: needs a file. Fix: for example `--config configs/gpu.yaml`.")
            files.append(args[position + 1])
            position += 1
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        elif re.match(r"-c[^-]", argument):
            files.append(argument.removeprefix("-c").removeprefix("="))
        else:
            rest.append(argument)
        position += 1
    return files, rest


def load_config(file: str) -> dict[str, Any]:
    """Reads a YAML file that contains a mapping.

    Args:
        file: path of the file. ``configs/NAME.yaml`` may also be a config of this program: it is found from any working
            directory, unless the working directory has a file of this path.

    Raises:
        UserError: the file does not exist, is not valid YAML, or is no mapping.
    """
    path = Path(file)
    if not path.is_file() and path.parent == Path("configs"):
        path = CONFIGS / path.name
    if not path.is_file():
        available = ", ".join(f"configs/{config.name}" for config in sorted(CONFIGS.glob("*.yaml")))
        raise UserError(f"--config {file}: no such file. Fix: give a path, or one of {available}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: not valid YAML: {one_line(error, 400)}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {file}: expected a mapping with keys like `model:` and `data:`, got {content!r:.60}")
    return content


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Merges two configs.

    Args:
        base: the earlier config.
        update: the later config. Its values replace those of ``base``; if the ``class_path`` of a mapping differs, the
            whole mapping is replaced.

    Returns:
        The merged config; ``base`` and ``update`` are not changed.
    """
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
    """Yields the options of a command line as (key, value, words of the command line).

    The key is "" for a word that is no option; the value is "" for an option without one.
    """
    position = 0
    while position < len(args):
        words = args[position : position + 1]
        key, equals, value = words[0].partition("=")
        if not equals and key.startswith("--") and not "".join(args[position + 1 : position + 2]).startswith("--"):
            words = args[position : position + 2]
            value = "".join(words[1:])
        yield key.removeprefix("--") if key.startswith("--") else "", value, words
        position += len(words)


def _yaml_or_text(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return value


def _arguments(slot: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns the mapping that contains a key: the ``init_args`` of a class if the command line left that word out."""
    inside = "class_path" in slot and key not in ("class_path", "init_args", "dict_kwargs")
    return slot.setdefault("init_args", {}) if inside else slot


def _set_null(config: dict[str, Any], path: list[str]) -> None:
    """Sets a key to null, also if its value was a class.

    Raises:
        UserError: a part of the path is a plain value, which has no keys.
    """
    slot: Any = config
    for number, key in enumerate(path, start=1):
        if not isinstance(slot, dict):
            raise UserError(f"--{'.'.join(path)}=null: {'.'.join(path[: number - 1])} is {slot!r}, which has no {key}")
        slot = _arguments(slot, key)
        if number == len(path):
            slot[key] = None
        slot = slot.setdefault(key, {})


def _add_to_mapping(config: dict[str, Any], path: list[str], value: str) -> bool:
    """Sets one key of a mapping that is plain data, such as ``task_weights``, and keeps the other keys.

    jsonargparse would replace the whole mapping by one with this key only.

    Returns:
        Whether the key is part of such a mapping. A class, its arguments and the groups of options are not.
    """
    if len(path) < 3 or path[-2] not in PLAIN_MAPPINGS:
        return False
    parent: Any = config
    for key in path[:-2]:
        parent = _arguments(parent, key).get(key) if isinstance(parent, dict) else None
    if not isinstance(parent, dict) or not ("class_path" in parent or path[-3] == "init_args"):
        return False
    arguments = _arguments(parent, path[-2])
    slot = arguments[path[-2]] = dict(arguments.get(path[-2]) or PLAIN_MAPPINGS[path[-2]])
    try:
        slot[path[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--{'.'.join(path)}={value}: not valid YAML: {one_line(error, 200)}") from error
    name = ".".join(path)
    print(redact_text(f"--{name}={value}: {path[-2]} is now {redact({path[-2]: slot})[path[-2]]}"), file=sys.stderr)
    return True


def _class_of(value: str) -> str | None:
    """Returns the class that a value of the command line names.

    A value may be a class path, a mapping with a ``class_path``, or something else: a name such as ``cpu``, a number, a
    list, a mapping of options, or a YAML file.
    """
    if value[:1] in "{[":
        try:
            content = yaml.safe_load(value)
        except yaml.YAMLError:
            return None
        return content.get("class_path") if isinstance(content, dict) else None
    is_path = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", value) and not Path(value).is_file()
    return value if is_path and ("." in value or value[:1].isupper()) else None


def _forget_other_class(config: dict[str, Any], path: list[str], value: str) -> None:
    """Removes the ``init_args`` of a key if the command line gives another class, or no class, for it."""
    slot: Any = config
    parent: Any = None
    for key in path:
        parent = _arguments(slot, key) if isinstance(slot, dict) else {}
        if key not in parent:
            return
        slot = parent[key]
    if not isinstance(slot, dict) or "class_path" not in slot:
        return
    class_path = _class_of(value)
    if class_path is None:
        if not value.startswith("{"):  # a mapping without a class changes arguments of this class
            del parent[path[-1]]
    elif slot["class_path"].split(".")[-1] != class_path.split(".")[-1]:
        slot.clear()
        slot["class_path"] = class_path
