"""Constructor arguments as plain data, in the form of a config file.

LightningCLI stores such a tree in every checkpoint. A module that is built in plain Python stores the same tree, so
both kinds of checkpoint load with ``weights_only=True`` and are rebuilt in the same way.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from datamodules.errors import UserError, one_line

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"  #: the function that Lightning rebuilds a module with
#: packages whose classes a checkpoint may name; importing a class runs the code of its module
TRUSTED_PACKAGES = frozenset(
    {"bitsandbytes", "lightning", "lightning_modules", "optimizers", "peft", "torch", "torchao", "transformers"}
)
CLASS_ARGUMENTS = ("objective", "optimizer", "lr_scheduler")  #: a string here is an import path in any case
_DOTTED = re.compile(r"(?<![\w./\\:-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def to_plain(value: Any) -> Any:
    """Converts an argument into ``class_path``/``init_args``, dicts, lists, strings and numbers.

    Args:
        value: plain data, a dataclass of plain data, a class, or a ``functools.partial`` of a class with keyword
            arguments only.

    Raises:
        TypeError: any other value, since a checkpoint can't rebuild it without unpickling code.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        arguments = {field.name: to_plain(getattr(value, field.name)) for field in fields(value) if field.init}
        # As in a config, a plain record is its fields alone; an implementation of an interface also names its class
        if type(value).__bases__ == (object,):
            return arguments
        return {"class_path": public_path(type(value)), "init_args": arguments}
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        return {"class_path": public_path(value.func), "init_args": to_plain(value.keywords)}
    if isinstance(value, type):
        return {"class_path": public_path(value)}
    raise TypeError(
        f"{value!r} can't be stored in a checkpoint: pass plain data, a dataclass, a class or functools.partial(class)"
    )


def plain_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Converts constructor arguments into the tree that LightningCLI stores.

    Returns:
        The tree, and the names of the arguments that can't be converted and are left out of it.
    """
    plain: dict[str, Any] = {"_instantiator": INSTANTIATOR}
    missing = []
    for name, value in arguments.items():
        try:
            plain[name] = to_plain(value)
        except TypeError:
            missing.append(name)
    return plain, missing


def plain_or_itself(value: Any) -> Any:
    """Converts an argument as :func:`to_plain` does; returns the argument unchanged if that is impossible."""
    try:
        return to_plain(value)
    except TypeError:
        return value


def public_path(cls: type) -> str:
    """Returns the shortest dotted path under which a package exports a class.

    Checkpoints store it instead of the module in which the class is defined, so they survive a move of the class:
    ``lightning_modules.Distillation``, not ``lightning_modules.losses.objectives.Distillation``.

    Raises:
        TypeError: the class is defined in a function or in the main script, so no path leads to it.
    """
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        raise TypeError(f"{cls.__qualname__} has no import path: define it at the top level of a module")
    names = cls.__module__.split(".")
    for length in range(1, len(names)):
        package = ".".join(names[:length])
        if getattr(sys.modules.get(package), cls.__qualname__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def check_class_paths(arguments: Mapping[str, Any], *packages: str) -> None:
    """Refuses stored arguments that would import code from a package that is not trusted.

    Rebuilding a module imports every class that the arguments name, and importing a module runs its code. The check
    itself imports nothing.

    Args:
        arguments: as stored in a checkpoint, without those that the caller passes.
        *packages: top-level packages that are trusted in addition to :data:`TRUSTED_PACKAGES`.

    Raises:
        UserError: an argument names a class of another package.
    """
    trusted = TRUSTED_PACKAGES.union(packages)
    for name, value in arguments.items():
        if name == "_instantiator" and value == INSTANTIATOR:
            continue
        for path in _import_paths(value, strict=name in CLASS_ARGUMENTS):
            if path.partition(".")[0] not in trusted:
                raise UserError(
                    f"checkpoint argument {name}={one_line(path)}: loading it would run code of a package that is not "
                    f"one of {', '.join(sorted(trusted))}. Fix: if you trust the class, import it and pass "
                    f"{name}=... to load_from_checkpoint"
                )


def _import_paths(value: Any, strict: bool) -> Iterator[str]:
    """Yields the strings of a tree that name something to import.

    Args:
        value: the tree.
        strict: every string counts as an import path; otherwise only strings from which jsonargparse might import.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _import_paths(item, strict=key == "class_path")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _import_paths(item, strict=False)
    elif isinstance(value, str):
        # jsonargparse also accepts a file or inline YAML in place of a class
        if strict or "class_path" in value or _is_file(value):
            yield value
        else:
            yield from (path for path in _DOTTED.findall(value) if _is_importable(path.partition(".")[0]))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def _is_importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: a module without a spec, such as __main__
        return True


def read_arguments(checkpoint_path: Any, weights_only: bool, key: str) -> dict[str, Any]:
    """Reads the constructor arguments that a checkpoint stores.

    Args:
        checkpoint_path: a path, a URL or a binary file.
        weights_only: as in ``torch.load``.
        key: of the arguments in the checkpoint.
    """
    if hasattr(checkpoint_path, "read"):
        position = checkpoint_path.tell()
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=weights_only)
        checkpoint_path.seek(position)
    else:
        with get_filesystem(checkpoint_path).open(str(checkpoint_path), "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only)
    return dict(checkpoint.get(key, {}))
