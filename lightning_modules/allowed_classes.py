"""The classes and functions that a config or a checkpoint may name; importing any other one runs its author's code.

One list serves both: the configs of the commands (:mod:`commands.config_merge`) and the arguments that a checkpoint
stores (:meth:`lightning_modules.causal_lm.CausalLMModule.load_from_checkpoint`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from datamodules.errors import UserError, one_line

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"  #: the function that Lightning rebuilds a module with
#: packages, modules and names that may be named; everything below an entry is allowed too
ALLOWED = frozenset({
    "bitsandbytes.optim", "callbacks", "datamodules", "lightning.fabric.plugins", "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks", "lightning.pytorch.core", "lightning.pytorch.loggers", "lightning.pytorch.plugins",
    "lightning.pytorch.profilers", "lightning.pytorch.strategies", "lightning_modules", "optimizers", "torch.bfloat16",
    "torch.float16", "torch.float32", "torch.optim", "torchao.optim", "transformers.optimization",
})  # fmt: skip
CLASS_ARGUMENTS = ("objective", "optimizer", "lr_scheduler")  #: a string here is an import path in any case
#: keys of plain texts, from which nothing is imported: data sources and file names often look like import paths
PLAIN_KEYS = frozenset({
    "adapter", "cache_dir", "ckpt_path", "default_root_dir", "dir", "dirpath", "filename", "monitor",
    "model_name_or_path", "name", "quarantine_path", "revision", "save_dir", "sources", "sub_dir", "tokenizer",
    "version",
})  # fmt: skip
_DOTTED = re.compile(r"(?<![\w./\\:-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_MAX_FILE_BYTES = 1 << 20  #: largest config file that a value may name


def is_allowed(path: str, more: Collection[str] = ()) -> bool:
    """Returns whether a config or a checkpoint may name a class or a function.

    Only modules of allowed packages are imported. The object must also be defined in an allowed package, because
    ``callbacks.run_record.os.system`` is below an allowed name.

    Args:
        path: import path. A name without a dot is allowed: it can only mean a class that is imported already.
        more: packages, modules and names that are allowed in addition to :data:`ALLOWED`.
    """
    if "." not in path.strip():
        return True
    allowed = ALLOWED.union(more)
    if not _is_below(path, allowed):
        return False
    defined = _defining_path(path)
    return defined is None or _is_below(defined, allowed)


def check_class_paths(arguments: Mapping[str, Any], *packages: str) -> None:
    """Refuses arguments of a checkpoint that would import code which is not on the list.

    Rebuilding a module imports every class that the arguments name, and importing a module runs its code.

    Args:
        arguments: as stored in a checkpoint, without those that the caller passes.
        *packages: top-level packages that are trusted in addition to :data:`ALLOWED`.

    Raises:
        UserError: an argument names a class of another package.
    """
    for name, value in arguments.items():
        if name == "_instantiator" and value == INSTANTIATOR:
            continue
        for _, path in import_paths(value, name, strict=name in CLASS_ARGUMENTS):
            if _is_file(path) or not is_allowed(path, packages) or (name in CLASS_ARGUMENTS and "." not in path):
                raise UserError(
                    f"checkpoint argument {name}={one_line(path)}: loading it would run code that is not on the list "
                    f"of allowed classes (lightning_modules.allowed_classes). Fix: if you trust the class, import it "
                    f"and pass {name}=... to load_from_checkpoint"
                )


def import_paths(value: Any, place: str = "", strict: bool = False) -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the text of each part of a tree that names something to import.

    Args:
        value: the tree. A text may be YAML, as jsonargparse accepts it in place of a class; a file that a text names
            is yielded by its name.
        place: key of ``value``.
        strict: every text counts as an import path; otherwise only those that Python could import.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in PLAIN_KEYS and _is_plain(item):
                continue
            yield from import_paths(item, f"{place}.{key}".removeprefix("."), key in ("class_path", "_class_path"))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from import_paths(item, f"{place}.{index}")
    elif isinstance(value, str):
        loaded = _loaded(value)
        if isinstance(loaded, (Mapping, list)):
            yield from import_paths(loaded, place)
        elif isinstance(loaded, str) and loaded != value:
            yield from import_paths(loaded, place, strict)
        if strict or _is_file(value):
            yield place, value.strip()
        else:
            for path in _DOTTED.findall(value):
                if _is_importable(path.partition(".")[0]):
                    yield place, path


def file_content(path: str) -> Any:
    """Returns the YAML of a file that a config names in place of a class; None if it is no such file.

    Raises:
        UserError: the file is too large or can't be read.
    """
    if not _is_file(path):
        return None
    try:
        if Path(path).stat().st_size > _MAX_FILE_BYTES:
            raise UserError(f"{path}: more than {_MAX_FILE_BYTES} bytes, which is no config. Fix: name another file.")
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _is_below(path: str, allowed: Collection[str]) -> bool:
    parts = path.strip().split(".")
    return any(".".join(parts[:length]) in allowed for length in range(1, len(parts) + 1))


def _defining_path(path: str) -> str | None:
    """Returns the module and name in which an object is defined; None if there is no such object."""
    parts = path.strip().split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except Exception:  # noqa: S112 (no such module, or one that does not work on this machine)
            continue
        for name in parts[length:]:
            found = getattr(found, name, None)
            if isinstance(found, ModuleType):
                return found.__name__
        module, qualified = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
        return f"{module}.{qualified}" if module and qualified else None
    return None


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


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
