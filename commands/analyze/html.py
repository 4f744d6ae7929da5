"""Renders an analysis as one HTML file without scripts, images or external resources.

Text of findings is escaped, so that it can't become markup.
"""

from __future__ import annotations

from html import escape
from typing import Any

from callbacks.reporting.html_page import page
from commands.analyze.markdown import SHOWN, by_rank, provenance, visible
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
.low { background: #1d6fa5; } .info { background: #5b6470; } .quiet { color: #5b6470; font-size: .85rem; }
@media (prefers-color-scheme: dark) {
  body { background: #14171a; color: #e4e7ea; } code { background: #23282d; } tr { border-color: #2b3137; } }"""


def to_html(document: dict[str, Any]) -> str:
    """Returns the HTML page of an analysis.

    Args:
        document: a ``ground_truth_v1`` document of :class:`commands.analyze.pipeline.Analysis`, with the settings that
            ``analyze`` adds.
    """
    summaries, findings = document["summaries"], by_rank(document)
    top, actions, correlations = document["reductions"]["top_findings"], document["actions"], document["correlations"]
    body = [
        "<h1>Scan analysis</h1>",
        f"<p>{_counts(findings)}</p>",
        _paragraph(summaries["executive_summary"]),
        "<h2>Triage</h2>",
        _paragraph(summaries["triage_summary"]),
        _listed("ol", [_top(row) for row in top]),
        "<h2>What to do</h2>",
        _listed("ul", [_action(action) for action in actions]) or "<p>Nothing above info: no action is needed.</p>",
        "<h2>Correlations</h2>",
        _listed("ul", [_correlation(item) for item in correlations]) or "<p>None found.</p>",
        "<h2>Findings</h2>",
        _table(findings),
        "<h2>How this was made</h2>",
        _listed("ul", [text(line, 600) for line in provenance(document)]),
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


def _top(row: dict[str, Any]) -> str:
    head = f"<b>{text(row['title'])}</b> {_severity(row['severity'])} risk {text(row['risk_score'])}"
    return f"{head}<br>{text(row['reason'])}"


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
    head = "".join(f"<th>{name}</th>" for name in ("severity", "risk", "actionable", "category", "finding", "id"))
    rows = [
        f'<tr><td>{_severity(f["severity"])}</td><td class="number">{text(f["risk_score"])}</td>'
        f'<td class="number">{f["probability_actionable"]:.0%}</td><td>{text(f["category"], 120)}</td>'
        f"<td>{text(f['title'], 120)}</td><td>{text(f['id'], 120)}</td></tr>"
        for f in findings
    ]
    return "<table>\n<thead><tr>" + head + "</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"
