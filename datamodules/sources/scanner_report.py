"""Reads scanner reports, the input of ``analyze``: their findings are validated as those of an archive are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.formats import Reader, layout_of

if TYPE_CHECKING:
    from datamodules.sources.formats import Parsed


def read_report(report: Any, name: str = "report") -> Parsed:
    """Reads a scanner report: version 2 (``results`` by scanner) or 3 (``findings``, ``correlations``).

    Args:
        report: the JSON value.
        name: the option and the file, for messages and quarantined records.

    Raises:
        UserError: the value is not a scanner report.
    """
    if layout_of(report) not in ("scanner_report", "batch", "wrapped", "ground_truth"):
        raise UserError(
            f"{name}: no scanner report (neither 'results' nor 'findings'). Fix: give the scanner's JSON output"
        )
    reader = Reader(name, "", 0, strict=False)
    if not isinstance(report.get("results"), list):
        if isinstance(report.get("findings"), list):
            reader.read_findings(report["findings"])
            reader.read_correlations(report.get("correlations"))
        else:
            reader.read_value(report)
        return reader.parsed
    for result in report["results"]:
        if not isinstance(result, dict):
            reader.quarantine(InvalidRecord("not_an_object", "an entry of 'results'"), result)
        else:
            scanner = result.get("scanner")
            reader.read_findings(result.get("findings") or [], scanner if isinstance(scanner, str) else "unknown")
    return reader.parsed
