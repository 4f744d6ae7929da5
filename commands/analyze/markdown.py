"""An analysed report for people, as Markdown; text of findings can neither format nor link nor steer the terminal."""

from __future__ import annotations

import re
from typing import Any

from datamodules.records import SEVERITIES

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~&])")
SHOWN = 300  #: characters of a text


def to_markdown(document: dict[str, Any]) -> str:
    """Renders a ``ground_truth_v1`` document of :class:`commands.analyze.pipeline.Analysis`."""
    summaries = document["summaries"]
    parts = [
        "# Scan analysis",
        plain(summaries["executive_summary"], 4000),
        "## Triage",
        plain(summaries["triage_summary"], 4000),
        *_numbered(document["reductions"]["top_findings"]),
        "## What to do",
        *(_action(action) for action in document["actions"]),
        *([] if document["actions"] else ["Nothing above info: no action is needed."]),
        "## Correlations",
        *(_correlation(item) for item in document["correlations"]),
        *([] if document["correlations"] else ["None found."]),
        "## Findings",
        _table(by_rank(document)),
        "## How this was made",
        _provenance(document),
    ]
    return "\n\n".join(parts) + "\n"


def by_rank(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The findings, the worst first."""
    return sorted(
        document["enriched_findings"], key=lambda f: (-SEVERITIES.index(f["severity"]), -f["risk_score"], f["id"])
    )


def visible(text: Any, length: int = SHOWN) -> str:
    """Text on one line and of bounded length, control characters written out."""
    line = " ".join(str(text).split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= length else line[: length - 1] + "…"


def plain(text: Any, length: int = SHOWN) -> str:
    """Text on one line in which nothing is Markdown, HTML or a control character."""
    line = _SPECIAL.sub(r"\\\1", visible(text, length))
    return line.replace("://", ":\u200b//")  # no autolink to where an attacker wants


def code(text: str) -> str:
    """A command as inline code; a fence longer than any run of backticks in it."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}"


def _numbered(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{place}. **{plain(row['title'])}** ({row['severity']}, risk {row['risk_score']}): {plain(row['reason'])}"
        for place, row in enumerate(rows, 1)
    ]
    return ["\n".join(lines)] if lines else []


def _action(action: dict[str, Any]) -> str:
    lines = [f"- **{plain(action['title'])}** ({action['priority']}), for {plain(', '.join(action['finding_ids']))}"]
    lines += [f"  {plain(action['description'])}"] if action["description"] else []
    lines += [f"  {name}: {code(action[name])}" for name in ("command", "check") if name in action]
    lines += [f"  source: {plain(action['reference'])}"] if action["reference"] else []
    return "  \n".join(lines)


def _correlation(item: dict[str, Any]) -> str:
    severity = item["severity"] or "no severity"
    ids = plain(", ".join(item["related_finding_ids"]))
    return f"- **{plain(item['title'])}** ({severity}): {plain(item['rationale'])}  \n  {ids}"


def _table(findings: list[dict[str, Any]]) -> str:
    rows = ["| severity | risk | actionable | category | finding | id |", "|---|---:|---:|---|---|---|"]
    for f in findings:
        cells = (f["severity"], f["risk_score"], f"{f['probability_actionable']:.0%}", *(plain(f[k], 120) for k in ("category", "title", "id")))  # noqa: E501  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _provenance(document: dict[str, Any]) -> str:
    first, *rest = provenance(document)
    return "\n".join([plain(first, 600), "", *(f"- {plain(line, 600)}" for line in rest)])


def provenance(document: dict[str, Any]) -> list[str]:
    """Report, model and how it was asked; then what each task's answers came to."""
    about, reference = document["enrichment_results"]["model_report"], document["raw_reference"]
    how = "constrained to the schema" if about["constrained"] else "written freely"
    rows = [f"Report {reference['file']} (SHA-256 {reference['sha256']}), model {about['model']}, {how}."]
    for task, tally in about["answers"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in tally["by_rule"].items()) or "none"
        rows.append(f"{task}: {tally['by_model']} by the model, by rule: {reasons}")
    if unusable := reference["unusable"]:
        rows.append(f"{len(unusable)} records of the report were not usable")
    return rows
