"""Renders an analysis as one HTML file without scripts, images or external resources.

Text of findings is escaped, so that it can't become markup.
"""

from __future__ import annotations

from html import escape
from typing import Any

from callbacks.reporting.html_page import page
from commands.analyze.assessment.evidence import evidence, skipped_lines
from commands.analyze.markdown import (
    SHOWN,
    by_rank,
    lowered_advice,
    lowered_rows,
    lowered_title,
    no_actions,
    provenance,
    rated,
    visible,
)
from datamodules.records import SEVERITIES

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #d5d9de; }
table { border-collapse: collapse; width: 100%; }
td, th { padding: .3rem .6rem; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #e8ebee; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #f2f4f6; padding: .1rem .3rem; overflow-wrap: anywhere; } td, p, li { overflow-wrap: anywhere; }
.severity { border-radius: .6rem; padding: .05rem .6rem; color: #fff; white-space: nowrap; }
.critical { background: #86101c; } .high { background: #c2410c; } .medium { background: #a16207; }
.box { border-left: .3rem solid; padding: .2rem 1rem; margin: 1rem 0; } .box h2 { border: 0; margin: .4rem 0; }
.box.lowered { border-color: #b91c1c; background: #fdecec; } .box.limits { border-color: #a16207; background: #fdf6e3; }
.wide { overflow-x: auto; } .wide table { min-width: 60rem; }
.low { background: #1d6fa5; } .info { background: #5b6470; } .quiet { color: #5b6470; font-size: .85rem; }
@media (prefers-color-scheme: dark) {
  body { background: #14171a; color: #e4e7ea; } code { background: #23282d; } tr { border-color: #2b3137; }
  .box.lowered { background: #3a1618; } .box.limits { background: #332a12; } .quiet { color: #9aa3ad; } }"""


def to_html(document: dict[str, Any]) -> str:
    """Returns the HTML page of an analysis.

    Args:
        document: a ``ground_truth_v1`` document of :class:`commands.analyze.pipeline.Analysis`, with the settings that
            ``analyze`` adds.
    """
    summaries, findings = document["summaries"], by_rank(document)
    by_id = {finding["id"]: finding for finding in findings}
    top, actions, correlations = document["reductions"]["top_findings"], document["actions"], document["correlations"]
    body = [
        "<h1>Scan analysis</h1>",
        _host(document),
        _banner(document),
        _lowered(document),
        f"<p>{_counts(findings)}</p>",
        _paragraph(summaries["executive_summary"]),
        "<h2>Triage</h2>",
        _paragraph(summaries["triage_summary"]),
        _listed("ol", [_top(row, by_id[row["id"]]) for row in top]),
        "<h2>What to do</h2>",
        _listed("ul", [_action(action) for action in actions]) or f"<p>{text(no_actions(document))}</p>",
        "<h2>Correlations</h2>",
        _listed("ul", [_correlation(item) for item in correlations]) or "<p>None found.</p>",
        "<h2>Findings</h2>",
        _table(findings),
        "<h2>How this was made</h2>",
        _listed("ul", [text(line, 600) for line in provenance(document)]),
        "<h2>Skipped</h2>",
        _listed("ul", [text(line, 600) for line in skipped_lines(document)]),
    ]
    return page("Scan analysis", "\n".join(part for part in body if part), STYLE)


def text(value: Any, length: int = SHOWN) -> str:
    """Returns text on one line, with HTML and control characters escaped."""
    return escape(visible(value, length))


def _paragraph(value: str) -> str:
    return f"<p>{text(value, 4000)}</p>"


def _listed(tag: str, items: list[str]) -> str:
    return f"<{tag}>\n" + "\n".join(f"<li>{item}</li>" for item in items) + f"\n</{tag}>" if items else ""


def _severity(name: Any) -> str:
    return f'<span class="severity {name}">{name}</span>' if name in SEVERITIES else "no severity"


def _counts(findings: list[dict[str, Any]]) -> str:
    counts = [(name, sum(finding["severity"] == name for finding in findings)) for name in reversed(SEVERITIES)]
    return f"{len(findings)} findings: " + " ".join(f"{_severity(name)} {count}" for name, count in counts if count)


def _host(document: dict[str, Any]) -> str:
    host = document["raw_reference"].get("host", {})
    parts = [f'<span class="quiet">{text(name)}</span> <b>{text(value)}</b>' for name, value in host.items()]
    return f"<p>{' · '.join(parts)}</p>" if parts else ""


def _banner(document: dict[str, Any]) -> str:
    lines = document["enrichment_results"]["model_report"]["known_limits"].get("banner", [])
    items = _listed("ul", [text(line, 600) for line in lines])
    return f'<div class="box limits"><b>Known limits of this model</b>\n{items}</div>' if lines else ""


def _lowered(document: dict[str, Any]) -> str:
    if not (title := lowered_title(document)):
        return ""
    items = _listed("ul", [_lowered_row(finding, reason) for finding, reason in lowered_rows(document)])
    return f'<div class="box lowered"><h2>{title}</h2>\n<p>{text(lowered_advice(document))}</p>\n{items}</div>'


def _lowered_row(finding: dict[str, Any], reason: str) -> str:
    change = f"lowered from {_severity(finding['scanner_severity'])} to {_severity(finding['model_severity'])}"
    parts = [f'<b>{text(finding["title"])}</b> {change} <span class="quiet">{text(finding["id"], 120)}</span>']
    parts.append(_evidence(finding))
    parts += [f"reason of the model: {text(reason)}"] if reason else []
    parts += [_limits(finding)] if finding["known_limits"] else []
    return "<br>".join(parts)


def _evidence(finding: dict[str, Any]) -> str:
    rows = [f"{text(label)} <code>{text(value)}</code>" for label, value in evidence(finding)]
    return f'<span class="quiet">evidence: {", ".join(rows) or "none in the report"}</span>'


def _limits(finding: dict[str, Any]) -> str:
    return f'<span class="quiet">known limits: {text("; ".join(finding["known_limits"]))}</span>'


def _top(row: dict[str, Any], finding: dict[str, Any]) -> str:
    head = f"<b>{text(row['title'])}</b> {_severity(row['severity'])} risk {text(row['risk_score'])}"
    return f"{head} ({rated(finding)})<br>{text(row['reason'])}<br>{_evidence(finding)}"


def _action(action: dict[str, Any]) -> str:
    for_ids = text(", ".join(action["finding_ids"]))
    parts = [f'<b>{text(action["title"])}</b> ({text(action["priority"])}) <span class="quiet">for {for_ids}</span>']
    parts += [text(action["description"])] if action["description"] else []
    parts += [f"<b>danger: {text(action['danger'])}</b>"] if "danger" in action else []
    parts += [f"needs: {text(', '.join(action['needs']))}"] if "needs" in action else []
    parts += [
        f"{name}: <code>{text(action[name], 4000)}</code>" for name in ("command", "undo", "check") if name in action
    ]
    parts += [f'<span class="quiet">source: {text(action["reference"])}</span>'] if action["reference"] else []
    return "<br>".join(parts)


def _correlation(item: dict[str, Any]) -> str:
    ids = text(", ".join(item["related_finding_ids"]))
    head = f"<b>{text(item['title'])}</b> {_severity(item['severity'])} {text(item['rationale'])}"
    return f'{head}<br><span class="quiet">{ids}</span>'


def _table(findings: list[dict[str, Any]]) -> str:
    columns = ("severity", "scanner", "model", "risk", "actionable", "category", "finding", "id")
    head = "".join(f"<th>{name}</th>" for name in columns)
    rows = [
        f"<tr><td>{_severity(f['severity'])}</td><td>{_severity(f['scanner_severity'])}</td>"
        f"<td>{_severity(f['model_severity']) if f['model_severity'] else 'no answer'}</td>"
        f'<td class="number">{text(f["risk_score"])}</td><td class="number">{f["probability_actionable"]:.0%}</td>'
        f"<td>{text(f['category'], 120)}</td><td>{_described(f)}</td><td>{text(f['id'], 120)}</td></tr>"
        for f in findings
    ]
    table = "<table>\n<thead><tr>" + head + "</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"
    return f'<div class="wide">{table}</div>'


def _described(finding: dict[str, Any]) -> str:
    parts = [text(finding["title"], 120), _evidence(finding)]
    return "<br>".join(parts + ([_limits(finding)] if finding["known_limits"] else []))
