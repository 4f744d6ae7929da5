"""Data pipeline from files to batches. It imports none of the project's other packages."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.batch import Batch
    from datamodules.findings import FindingsDataModule

__all__ = ["Batch", "FindingsDataModule"]

_MODULES = {"Batch": "datamodules.batch", "FindingsDataModule": "datamodules.findings"}


def __getattr__(name: str) -> Any:
    """Imports a class at its first use (PEP 562): generator and parsers need no torch, whose import takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
