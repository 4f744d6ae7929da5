"""Renders an analysis as Markdown.

Text of findings is escaped, so that it can't become formatting, a link or a control sequence of the terminal.
"""

from __future__ import annotations

import re
from typing import Any

from datamodules.records import SEVERITIES

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~&])")
SHOWN = 300  #: largest number of characters of a text


def to_markdown(document: dict[str, Any]) -> str:
    """Returns the Markdown text of an analysis.

    Args:
        document: a ``ground_truth_v1`` document of :class:`commands.analyze.pipeline.Analysis`, with the settings that
            ``analyze`` adds.
    """
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
    """Returns the findings, the most severe first."""
    return sorted(
        document["enriched_findings"], key=lambda f: (-SEVERITIES.index(f["severity"]), -f["risk_score"], f["id"])
    )


def visible(text: Any, length: int = SHOWN) -> str:
    """Returns text on one line of bounded length, with control characters as escape sequences."""
    line = " ".join(str(text).split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= length else line[: length - 1] + "…"


def plain(text: Any, length: int = SHOWN) -> str:
    """Returns text on one line, with Markdown, HTML and control characters escaped."""
    line = _SPECIAL.sub(r"\\\1", visible(text, length))
    # Markdown viewers turn a URL into a link, and an attacker may have written this one
    return line.replace("://", ":\u200b//")


def code(text: str) -> str:
    """Returns a command as inline code; its fence is longer than any run of backticks in the command."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}"


def _numbered(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{number}. **{plain(row['title'])}** ({row['severity']}, risk {row['risk_score']}): {plain(row['reason'])}"
        for number, row in enumerate(rows, 1)
    ]
    return ["\n".join(lines)] if lines else []


def _action(action: dict[str, Any]) -> str:
    lines = [f"- **{plain(action['title'])}** ({action['priority']}), for {plain(', '.join(action['finding_ids']))}"]
    lines += [f"  {plain(action['description'])}"] if action["description"] else []
    lines += [f"  **danger: {plain(action['danger'])}**"] if "danger" in action else []
    lines += [f"  needs: {plain(', '.join(action['needs']))}"] if "needs" in action else []
    lines += [f"  {name}: {code(action[name])}" for name in ("command", "undo", "check") if name in action]
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
    """Returns lines about the report, the model and its settings, and the number of answers of each task."""
    about, reference = document["enrichment_results"]["model_report"], document["raw_reference"]
    decoding = "constrained to the schema" if about["constrained"] else "unconstrained"
    rows = [f"Report {reference['file']} (SHA-256 {reference['sha256']}), model {about['model']}, {decoding}."]
    for task, counts in about["answers"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts["by_rule"].items()) or "none"
        rows.append(f"{task}: {counts['by_model']} by the model, by rule: {reasons}")
    if unusable := reference["unusable"]:
        rows.append(f"{len(unusable)} records of the report were not usable")
    return rows
