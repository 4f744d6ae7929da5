"""Constructor arguments as plain data, in the form that a config has.

LightningCLI stores such a tree in every checkpoint. A module made in plain Python gets the same one, so that both load
with ``weights_only=True`` and are rebuilt in one way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"  #: what Lightning rebuilds a module with from such a tree


def to_plain(value: Any) -> Any:
    """Turns an argument into ``class_path``/``init_args``, dicts, lists, strings and numbers.

    Args:
        value: plain data, a dataclass of such, a class, or a ``functools.partial`` of one with keyword arguments.

    Raises:
        TypeError: anything else, since it could not be rebuilt from a checkpoint without unpickling code.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        arguments = {field.name: to_plain(getattr(value, field.name)) for field in fields(value) if field.init}
        # A record is named by its fields alone, as in a config; what implements an interface says which class it is
        return arguments if type(value).__bases__ == (object,) else {"class_path": _path(value), "init_args": arguments}
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        return {"class_path": _path(value.func), "init_args": to_plain(value.keywords)}
    if isinstance(value, type):
        return {"class_path": _path(value)}
    raise TypeError(
        f"{value!r} can't be stored in a checkpoint: pass plain data, a dataclass, a class or functools.partial(class)"
    )


def _path(value: Any) -> str:
    """The dotted path of a class, or of an object's class."""
    target = value if isinstance(value, type) else type(value)
    if "<locals>" in target.__qualname__ or target.__module__ == "__main__":
        raise TypeError(f"{target.__qualname__} can't be found again by its path: define it at the top of a module")
    return f"{target.__module__}.{target.__qualname__}"
