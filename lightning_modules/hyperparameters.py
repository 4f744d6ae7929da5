"""Constructor arguments as plain data, in the form of a config file.

LightningCLI stores such a tree in every checkpoint. A module that is built in plain Python stores the same tree, so
both kinds of checkpoint load with ``weights_only=True`` and are rebuilt in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_modules.allowed_classes import INSTANTIATOR


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
