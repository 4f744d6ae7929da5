"""Finds the paths in a run's ``config.yaml`` that a command may not write to unless its command line names them.

A run may come from somebody else. Its config may therefore name only places inside its own folder, and the folder of
runs that contains it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

CONFIG_FILE = "config.yaml"  #: name under which LightningCLI writes the config into a run folder
DEFAULT_SAVE_DIR = "runs"  #: ``save_dir`` of the configs of this program; a run may name it from any place
#: arguments of this project's and Lightning's classes that are paths to write to
WRITE_KEYS = frozenset(
    {"cache_dir", "compilation_cache_dir", "default_root_dir", "dirpath", "log_dir", "quarantine_path", "root_dir",
     "save_dir"}
)  # fmt: skip
#: arguments that are appended to such a path
PARTS = frozenset({"filename", "name", "sub_dir", "version"})


def is_run_config(file: Path) -> bool:
    """Returns whether a config file is one that a fit wrote: by its name, or by its folder."""
    return file.name == CONFIG_FILE or (file.parent / "run.json").is_file()


def foreign_paths(config: Mapping[str, Any], run: Path, place: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the value of each path outside of a run that its config writes to.

    Args:
        config: content of the file.
        run: folder of the file.
        place: key of ``config``.
    """
    for key, value in config.items():
        here = f"{place}.{key}".removeprefix(".")
        if isinstance(value, Mapping):
            yield from foreign_paths(value, run, here)
        elif isinstance(value, list):
            items = {str(index): item for index, item in enumerate(value) if isinstance(item, Mapping)}
            yield from foreign_paths(items, run, here)
        elif not isinstance(value, str) or not value:
            continue
        elif (key in WRITE_KEYS and not _belongs_to(run, key, value, config.get("name"))) or (
            key in PARTS and (PurePath(value).is_absolute() or ".." in PurePath(value).parts)
        ):
            yield here, value


def repeated_options(run: Path, config: str = CONFIG_FILE) -> dict[str, str]:
    """Returns the options that a command with the config of a run must give again: option -> value.

    Args:
        run: run folder.
        config: name of the config file in it.
    """
    try:
        content = yaml.safe_load((run / config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(content, Mapping):
        return {}
    found = foreign_paths(content, run)
    return {key: value for key, value in found if not any(part.isdigit() for part in key.split("."))}


def _belongs_to(run: Path, key: str, value: str, name: Any) -> bool:
    run, path = run.resolve(), Path(value).resolve()
    if path.is_relative_to(run):
        return True
    if key == "save_dir":
        return value == DEFAULT_SAVE_DIR or (path / str(name or "")).resolve() == run.parent
    return key == "default_root_dir" and path == run.parent
