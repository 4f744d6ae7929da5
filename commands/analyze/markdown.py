"""Renders an analysis as Markdown.

Text of findings is escaped, so that it can't become formatting, a link or a control sequence of the terminal.
"""

from __future__ import annotations

import re
from typing import Any

from commands.analyze.assessment.evidence import evidence, skipped_lines
from commands.analyze.assessment.trust import LEVELS

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~&])")
SHOWN = 300  #: largest number of characters of a text


def to_markdown(document: dict[str, Any]) -> str:
    """Returns the Markdown text of an analysis.

    Args:
        document: a ``ground_truth_v1`` document of :class:`commands.analyze.pipeline.Analysis`, with the settings that
            ``analyze`` adds.
    """
    summaries, findings = document["summaries"], {finding["id"]: finding for finding in document["enriched_findings"]}
    parts = [
        "# Scan analysis",
        *_host(document),
        *_banner(document),
        *_lowered(document),
        plain(summaries["executive_summary"], 4000),
        "## Triage",
        plain(summaries["triage_summary"], 4000),
        *_numbered(document["reductions"]["top_findings"], findings),
        "## What to do",
        *(_action(action) for action in document["actions"]),
        *([] if document["actions"] else [no_actions(document)]),
        "## Correlations",
        *(_correlation(item) for item in document["correlations"]),
        *([] if document["correlations"] else ["None found."]),
        "## Findings",
        _table(by_rank(document)),
        "## How this was made",
        _provenance(document),
        "## Skipped",
        "\n".join(f"- {plain(line, 600)}" for line in skipped_lines(document)),
    ]
    return "\n\n".join(parts) + "\n"


def no_actions(document: dict[str, Any]) -> str:
    """Returns the sentence of a report without actions; it depends on the scanner's severities too."""
    findings, reference = document["enriched_findings"], document["raw_reference"]
    severities = [f[key] for f in findings for key in ("severity", "scanner_severity", "model_severity") if f[key]]
    severities += [reference["skipped"]["worst"]["severity"]] if "skipped" in reference else []
    if any(LEVELS[name] >= LEVELS["medium"] for name in severities):
        return "No action was requested or selected: see the severities of the scanner and of the model above."
    if reference.get("unusable") or reference.get("scanner_errors"):
        return "The scan is incomplete: see the last section."
    if any(name != "info" for name in severities):
        return "No action was requested or selected."
    return "Nothing above info: no action is needed."


def rated(finding: dict[str, Any]) -> str:
    """Returns the severities of the scanner and the model: "scanner critical, model low"."""
    return f"scanner {finding['scanner_severity']}, model {finding['model_severity'] or 'no valid answer'}"


def lowered_title(document: dict[str, Any]) -> str:
    """Returns the title of the box of lowered findings; "" if there is none."""
    lowered = document["enrichment_results"]["model_report"]["lowered"]
    count = lowered["count"]
    return f"The model rates {count} finding{'s' * (count != 1)} far lower than the scanner" if count else ""


def lowered_advice(document: dict[str, Any]) -> str:
    """Returns the sentence under the title of the box of lowered findings."""
    trust = document["enrichment_results"]["model_report"]["trust"]
    uses = {"higher": "the higher severity", "scanner": "the scanner's severity", "model": "the model's severity"}
    return f"Check each of them first. Ranking, triage and actions use {uses[trust]} (--trust {trust})."


def lowered_rows(document: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Returns the lowered findings with the model's reasons ("" without one), the scanner's most severe first."""
    findings = {finding["id"]: finding for finding in document["enriched_findings"]}
    lowered = document["enrichment_results"]["model_report"]["lowered"]["findings"]
    return [(findings[row["id"]], row.get("reason", "")) for row in lowered]


def _host(document: dict[str, Any]) -> list[str]:
    host = document["raw_reference"].get("host", {})
    return [" · ".join(f"{name} **{plain(value)}**" for name, value in host.items())] if host else []


def _banner(document: dict[str, Any]) -> list[str]:
    lines = document["enrichment_results"]["model_report"]["known_limits"].get("banner", [])
    return (
        ["\n".join(["> **Known limits of this model**", ">", *(f"> - {plain(x, 600)}" for x in lines)])]
        if lines
        else []
    )


def _lowered(document: dict[str, Any]) -> list[str]:
    if not (title := lowered_title(document)):
        return []
    lines = [f"> **{title}.** {plain(lowered_advice(document))}", ">"]
    for finding, reason in lowered_rows(document):
        lines.append(
            f"> - **{plain(finding['title'])}**: lowered from **{finding['scanner_severity']}** to "
            f"**{finding['model_severity']}** ({plain(finding['id'], 120)})"
        )
        parts = [_evidence(finding)]
        parts += [f"reason of the model: {plain(reason)}"] if reason else []
        parts += [f"known limits: {plain('; '.join(finding['known_limits']))}"] if finding["known_limits"] else []
        for part in parts:
            lines[-1] += "  "  # a line break of Markdown
            lines.append(f">   {part}")
    return ["\n".join(lines)]


def _evidence(finding: dict[str, Any]) -> str:
    rows = evidence(finding)
    return "evidence: " + (", ".join(f"{plain(label)} {plain(value)}" for label, value in rows) or "none in the report")


def by_rank(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the findings, the most severe first."""
    return sorted(document["enriched_findings"], key=lambda f: (-LEVELS[f["severity"]], -f["risk_score"], f["id"]))


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


def _numbered(rows: list[dict[str, Any]], findings: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for number, row in enumerate(rows, 1):
        finding = findings[row["id"]]
        lines.append(
            f"{number}. **{plain(row['title'])}** ({row['severity']}; {rated(finding)}; risk {row['risk_score']}): "
            f"{plain(row['reason'])}  \n   {_evidence(finding)}"
        )
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
    columns = (
        "severity",
        "scanner",
        "model",
        "risk",
        "actionable",
        "category",
        "finding",
        "evidence",
        "known limits",
        "id",
    )
    rows = ["| " + " | ".join(columns) + " |", "|---|---|---|---:|---:|---|---|---|---|---|"]
    for f in findings:
        cells = (
            f["severity"], f["scanner_severity"], f["model_severity"] or "no answer", f["risk_score"],
            f"{f['probability_actionable']:.0%}", plain(f["category"], 120), plain(f["title"], 120),
            _evidence(f).removeprefix("evidence: "), plain("; ".join(f["known_limits"])), plain(f["id"], 120),
        )  # fmt: skip
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
    lowered = about["lowered"]["count"]
    rows.append(f"severities by --trust {about['trust']}; findings that the model rates far lower: {lowered}")
    return rows
