"""Evidence of a finding, data of the host, and the parts of a report that were not analysed.

All values are text of the report, which an attacker may have written: the callers escape them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from commands.analyze.assessment.trust import counts_text
from datamodules.records import SEVERITIES
from datamodules.tasks.base import compact_json, truncate

if TYPE_CHECKING:
    from datamodules.records import Finding

MAX_VALUE = 160  #: characters of a value
MAX_ITEMS = 8  #: values in a line of evidence
MAX_WARNINGS = 5  #: scanner errors whose text is kept

#: label: the metadata fields that hold it, in order of preference
_FIELDS = {
    "path": ("path", "file", "exe", "executable", "binary", "unit"),
    "command": ("command", "cmdline", "arguments", "exec"),
    "environment": ("env", "environment", "variable"),
    "value": ("value",),
    "pid": ("pid",),
    "parent": ("ppid",),
    "port": ("port", "local_port"),
    "address": ("local_address", "listen", "bind"),
    "remote": ("foreign_address", "remote_ip", "remote_address", "ip", "source"),
    "process": ("process", "program"),
    "user": ("user", "account", "owner", "uid", "set_by", "loaded_by"),
    "mode": ("mode", "permissions"),
    "module": ("module",),
    "domain": ("domain", "query"),
    "current": ("current",),
    "desired": ("desired",),
    "rule": ("rule",),
    "state": ("state", "status"),
}
_PATH = re.compile(r"(?<![\w/.])(/[\w.+@~-]+(?:/[\w.+@~:-]+)+)")
_PORT = re.compile(r"\b(?:port|tcp|udp)[ :]+(\d{1,5})\b", re.IGNORECASE)
_MODULE = re.compile(r"\bmodule (\S+)$", re.IGNORECASE)
_PID_IN_ID = re.compile(r":(\d{1,7})$")


def evidence(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the evidence of a finding as labels and values, such as ``[("path", "/tmp/x"), ("pid", "77")]``.

    Values come from the metadata; path, port and module also from the id, the title and the description, because the
    scanner writes the path of an SUID file into the id only.

    Args:
        record: a finding of the part ``enriched_findings``.
    """
    metadata = record.get("metadata") or {}
    found: dict[str, str] = {}
    for label, names in _FIELDS.items():
        value = next((metadata[name] for name in names if _is_evidence(metadata.get(name))), None)
        if value is None:
            value = _from_text(label, record)
        if value is not None:
            found[label] = truncate(value if isinstance(value, str) else compact_json(value), MAX_VALUE)
    if not found and metadata:  # a scanner with other fields
        values = {truncate(str(k), 40): truncate(compact_json(v).strip('"'), MAX_VALUE) for k, v in metadata.items()}
        found = dict(list(values.items())[:4])
    return list(found.items())[:MAX_ITEMS]


def _is_evidence(value: Any) -> bool:
    return value is not None and value != "" and not isinstance(value, bool) and value != [] and value != {}


def _from_text(label: str, record: Mapping[str, Any]) -> str | None:
    title, name, description = (str(record.get(key) or "") for key in ("title", "id", "description"))
    if label == "path":
        name = _PID_IN_ID.sub("", name)
        if name.startswith("/"):
            return name
        match = _PATH.search(title) or _PATH.search(description)
    elif label == "pid":
        match = _PID_IN_ID.search(name) if name.startswith("/") else None
    elif label == "port":
        match = _PORT.search(title) or _PORT.search(description)
    elif label == "module" and record.get("category") in ("modules", "kernel_module"):
        match = _MODULE.search(title)
    else:
        return None
    return match[1] if match else None


def host_of(report: Any) -> dict[str, str]:
    """Returns host, operating system, kernel, time of the scan and scanner of a report, as far as it has them.

    Args:
        report: JSON value of the scanner; version 4 has the raw report under ``raw_reference``.
    """
    report = report if isinstance(report, dict) else {}
    raw = report.get("raw_reference")
    raw = raw if isinstance(raw, dict) else {}
    meta, summary = ({**_object(raw, name), **_object(report, name)} for name in ("meta", "summary"))
    results = report.get("results")
    first = results[0] if isinstance(results, list) and results and isinstance(results[0], dict) else {}
    system = meta.get("os_pretty") or " ".join(str(meta[k]) for k in ("os_id", "os_version") if meta.get(k))
    tool = meta.get("tool_version")
    values = {
        "host": meta.get("hostname") or report.get("host_id") or raw.get("hostname"),
        "operating system": system,
        "kernel": meta.get("kernel"),
        "architecture": meta.get("arch"),
        "scanned": summary.get("finished_at") or summary.get("started_at") or first.get("end_time")
        or meta.get("timestamp") or report.get("generated_at"),
        "scanner": f"sys-scan {tool}" if tool else None,
    }  # fmt: skip
    return {name: truncate(str(value), MAX_VALUE) for name, value in values.items() if _is_evidence(value)}


def _object(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    inner = value.get(name)
    return inner if isinstance(inner, dict) else {}


def scanner_failures(report: Any) -> dict[str, Any]:
    """Returns the scanners that failed, and the number of objects that the scanner could not read.

    Args:
        report: JSON value of the scanner.

    Returns:
        ``scanner_errors`` (texts) and ``collection_warnings`` (a count), each left out if there are none.
    """
    report = report if isinstance(report, dict) else {}
    errors, warnings = report.get("scanner_errors"), report.get("collection_warnings")
    texts = [truncate(compact_json(item), MAX_VALUE) for item in errors] if isinstance(errors, list) else []
    found: dict[str, Any] = {"scanner_errors": texts[:MAX_WARNINGS]} if texts else {}
    return found | ({"collection_warnings": len(warnings)} if isinstance(warnings, list) and warnings else {})


def skipped_findings(findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the count of findings that ``--limit`` leaves out, by the scanner's severity, and the worst of them.

    Args:
        findings: at least one finding.
    """
    counts = Counter(finding.severity for finding in findings)
    worst = max(findings, key=lambda finding: (SEVERITIES.index(finding.severity), finding.risk_score))
    return {
        "findings": len(findings),
        "by_severity": {name: counts[name] for name in reversed(SEVERITIES) if counts[name]},
        "worst": {"id": worst.id, "title": truncate(worst.title, MAX_VALUE), "severity": worst.severity},
    }


def skipped_lines(document: Mapping[str, Any]) -> list[str]:
    """Returns lines about everything that the analysis of a report leaves out; one line states that there is nothing.

    Args:
        document: the analysis.
    """
    reference, findings = document["raw_reference"], document["enriched_findings"]
    lines = []
    if skipped := reference.get("skipped"):
        counts = ", ".join(f"{count} {name}" for name, count in skipped["by_severity"].items())
        total, worst = skipped["findings"] + len(findings), skipped["worst"]
        lines.append(
            f"{skipped['findings']} of {total} findings were not analysed (--limit {reference['limit']}); the scanner "
            f"rates them {counts}. The worst of them is {worst['severity']}: {worst['title']} ({worst['id']})."
        )
    if unusable := reference.get("unusable"):
        lines.append(f"Records of the report that were not usable: {len(unusable)}, see raw_reference.unusable.")
    lines += [f"A scanner failed: {error}" for error in reference.get("scanner_errors", ())]
    if warnings := reference.get("collection_warnings"):
        lines.append(f"Objects that the scanner could not read (collection_warnings of the report): {warnings}.")
    covered = {name for action in document["actions"] for name in action["finding_ids"]}
    without = [f["severity"] for f in findings if f["severity"] != "info" and f["id"] not in covered]
    if without:
        lines.append(f"Findings above info without an action here (--actions): {counts_text(without)}.")
    return lines or ["Nothing was skipped."]
