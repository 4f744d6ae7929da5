"""From files to batches; imports nothing of ours."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.batch import Batch
    from datamodules.findings import FindingsDataModule

__all__ = ["Batch", "FindingsDataModule"]

_HOMES = {"Batch": "datamodules.batch", "FindingsDataModule": "datamodules.findings"}


def __getattr__(name: str) -> Any:
    """Imports when first used (PEP 562): the generator and the parsers need no torch, which takes seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
