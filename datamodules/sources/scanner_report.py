"""Reads scanner reports, the input of ``analyze``: their findings are validated as those of an archive are.

Layouts of a report::

    version 2    {"meta": ..., "results": [{"scanner": "suid", "findings": [finding]}]}
    version 3    {"fact_pack_version": "3", "findings": [finding], "correlations": [...]}
    version 4    {"version": "ground_truth_v1", "enriched_findings": [...], "raw_reference": {"results": as version 2}}
    by category  {"suid": [finding], "network": [finding]}
    batch        a document of the data set's generator; see :mod:`datamodules.sources.formats`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from datamodules.records import SEVERITIES
from datamodules.sources.decompression import DuplicateKeys, strict_json_error
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.formats import Reader, layout_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datamodules.records import Finding
    from datamodules.sources.formats import Parsed

#: keys of a report that hold no findings, so that a report by category may have them too
NO_CATEGORIES = ("meta", "metadata", "summary", "statistics", "summary_extension", "collection_warnings")


def read_report(report: Any, name: str = "report") -> Parsed:
    """Reads a scanner report of any layout in the module's docstring.

    In a version-4 document, the raw scan comes first, because an enriched finding has a model's severity; an enriched
    finding is read only if the raw scan has no finding of its id.

    Args:
        report: the JSON value.
        name: the option and the file, for messages and quarantined records.

    Raises:
        UserError: the value is not a scanner report, or its outermost object repeats a key.
    """
    layout = _layout(report)
    if layout is None:
        raise UserError(
            f"{name}: no scanner report (neither 'results' nor 'findings'). Fix: give the scanner's JSON output"
        )
    if isinstance(report, DuplicateKeys):  # one of the two values would hide the findings of the other
        raise UserError(f"{name}: the outermost object repeats a key. Fix: let the scanner write the report again")
    reader = Reader(name, "", 0, strict=False)
    if layout == "results":
        _read_results(reader, report["results"])
    elif layout == "version_4":
        _read_version_4(reader, report)
    elif layout == "category":
        reader.read_findings({key: part for key, part in report.items() if key not in NO_CATEGORIES and part})
    elif isinstance(report.get("findings"), list):
        reader.read_findings(report["findings"])
        reader.read_correlations(report.get("correlations"))
    else:
        reader.read_value(report)
    return reader.parsed


def raw_reference(report: Any, findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the raw scan as the ``raw_reference`` of a version-4 document: ``results``, and ``meta`` if there is one.

    Parts that are not strict JSON (NaN, lone surrogates, more than 64 levels) are left out.

    Args:
        report: the JSON value of a report that :func:`read_report` can read.
        findings: usable findings of the report; they form the results of a report that has no results by scanner.
    """
    source = report.get("raw_reference") if _layout(report) == "version_4" else report
    source = source if isinstance(source, dict) else {}
    results = source.get("results")
    reference: dict[str, Any] = {
        "results": _results_by_category(findings)
        if not isinstance(results, list)
        else [_strict_result(result) for result in results if isinstance(result, dict)]
    }
    meta = source.get("meta")
    return {"meta": meta} | reference if isinstance(meta, dict) and strict_json_error(meta) is None else reference


def _layout(report: Any) -> str | None:
    """Returns results, version_4, category, or "other" for a layout of ``formats``; None if the value is no report."""
    if not isinstance(report, dict):
        return None
    if isinstance(report.get("results"), list):
        return "results"
    if report.get("version") == "ground_truth_v1" or "enriched_findings" in report:
        return "version_4"
    if layout_of(report) in ("scanner_report", "batch", "wrapped"):
        return "other"
    lists = [part for key, part in report.items() if key not in NO_CATEGORIES and isinstance(part, list)]
    is_finding = any(isinstance(item, dict) and ("title" in item or "severity" in item) for x in lists for item in x)
    return "category" if is_finding and not ("title" in report or "severity" in report) else None


def _read_results(reader: Reader, results: list[Any]) -> None:
    for result in results:
        if not isinstance(result, dict):
            reader.quarantine(InvalidRecord("not_an_object", "an entry of 'results'"), result)
        elif isinstance(result, DuplicateKeys):
            reader.quarantine(InvalidRecord("duplicate_keys", "an entry of 'results'"), result)
        else:
            scanner = result.get("scanner")
            reader.read_findings(result.get("findings") or [], scanner if isinstance(scanner, str) else "unknown")


def _read_version_4(reader: Reader, report: dict[str, Any]) -> None:
    raw = report.get("raw_reference")
    results = raw.get("results") if isinstance(raw, dict) else None
    if isinstance(results, list):
        _read_results(reader, results)
    elif results:
        reader.quarantine(InvalidRecord("unknown_layout", "'raw_reference.results' is no list"), results)
    ids = {finding.id for finding in reader.parsed.document.findings}
    enriched = report.get("enriched_findings") or []
    if not isinstance(enriched, list):
        reader.quarantine(InvalidRecord("unknown_layout", "'enriched_findings' is no list"), enriched)
        enriched = []
    others = [record for record in enriched if not (isinstance(record, dict) and _id(record) in ids)]
    # summaries and actions of an earlier analysis are read too, as those of a training document are
    rest = {key: report.get(key) for key in ("correlations", "summaries", "actions")}
    reader.read_value({"enriched_findings": [_with_scanner_severity(record) for record in others], **rest})


def _id(record: dict[str, Any]) -> str | None:
    name = record.get("id")
    return name if isinstance(name, str) else None


def _with_scanner_severity(record: Any) -> Any:
    """Returns a finding of an earlier analysis with the scanner's severity, which the model's had replaced."""
    if not isinstance(record, dict) or record.get("scanner_severity") not in SEVERITIES:
        return record
    score = record.get("base_severity_score", record.get("risk_score"))
    restored = {**record, "severity": record["scanner_severity"], "risk_score": score}
    return type(record)(restored)  # an object with a repeated key stays recognisable


def _results_by_category(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for finding in findings:
        record = {
            "id": finding.id, "title": finding.title, "severity": finding.severity, "risk_score": finding.risk_score,
            "base_severity_score": finding.base_severity_score, "description": finding.description,
            "metadata": finding.metadata,
        }  # fmt: skip
        groups.setdefault(finding.category, []).append(record)
    return [
        {"scanner": category, "finding_count": len(records), "findings": records}
        for category, records in groups.items()
    ]


def _strict_result(result: dict[str, Any]) -> dict[str, Any]:
    findings = result.get("findings") or []
    if isinstance(findings, list):
        findings = [record for record in findings if strict_json_error(record) is None]
    elif strict_json_error(findings) is not None:
        findings = []
    rest = {key: part for key, part in result.items() if key != "findings"}
    return (rest if strict_json_error(rest) is None else {}) | {"findings": findings}
