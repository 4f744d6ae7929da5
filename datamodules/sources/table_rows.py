"""Rows of tables (Parquet, a Hugging Face dataset) to what JSON would hold."""

from __future__ import annotations

from typing import Any

from datamodules.sources.decompression import loads
from datamodules.sources.field_coercion import InvalidRecord

#: fields that a flattened table holds as JSON text, and what their text begins with
_JSON_TEXT = dict.fromkeys(("metadata", "risk_subscores", "_langchain_enrichment"), "{") | dict.fromkeys(
    ("tags", "correlation_refs", "related_finding_ids", "rationale"), "["
)


def plain_row(row: Any) -> Any:
    """Turns a table's row into what JSON would hold: no nulls of other rows' fields, objects instead of JSON text."""
    if not isinstance(row, dict):
        return row
    plain = {name: _plain(value) for name, value in row.items() if value is not None}
    for name, opening in _JSON_TEXT.items():
        text = plain.get(name)
        if isinstance(text, str) and text.lstrip().startswith(opening):
            try:
                plain[name] = loads(text.encode("utf-8", "surrogatepass"))[0]
            except InvalidRecord:
                continue
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):  # Arrow's map type
            return {str(name): _plain(item) for name, item in value if item is not None}
        return [_plain(item) for item in value if item is not None]
    return str(value)
