"""Windows, the bounded parts of a document for tasks about many findings, and the texts about a window.

Every number, title and id of an answer appears in the window or is counted from it.

A document of n findings is divided into k = ``ceil(n / size)`` strided subsets, each with every k-th finding. Files
list findings by category and severity, so 24 consecutive findings would be 24 harmless processes; a strided subset is a
small copy of the host. Every second subset is split in two, each time at a different size, for two reasons: a host may
have only five findings, and windows of one size (2,000 tokens) fill rows of 8,192 tokens to 95 % only.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from typing import TYPE_CHECKING, Any

from datamodules.records import SEVERITIES
from datamodules.tasks.base import round_number, truncate
from datamodules.tasks.schemas import MAX_ID, MAX_SUMMARY, MAX_TITLE, MAX_TOP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from datamodules.records import Correlation, Document, Finding

MIN_FINDINGS_TO_SPLIT = 6  #: smaller subsets are not split in two
GOLDEN_RATIO_MULTIPLIER = 0.6180339887498949  #: (sqrt(5) - 1) / 2; its multiples modulo 1 are evenly distributed
MAX_LINKS = 4  #: correlations that the prompt of a window lists
MAX_LINK_IDS = 6  #: finding ids that are listed for such a correlation
URGENT = ("critical", "high")

#: recommendation by the highest severity; {top} is the title of the riskiest finding
ADVICE = {
    "critical": "Isolate the host and start incident response today, beginning with {top}.",
    "high": "Investigate {top} within a day, then work down the list by risk.",
    "medium": "Plan fixes for the next maintenance window, beginning with {top}.",
    "low": "No urgent action: cover {top} in routine hardening.",
    "info": "No action is needed; keep this state as the baseline.",
}


@dataclass(frozen=True, slots=True)
class Link:
    """A correlation as listed in the prompt of a window that holds at least two of its findings.

    Attributes:
        title: short name.
        severity: severity of the correlation, or None.
        risk_score: risk score of the correlation, or None.
        finding_ids: ids as shown in the prompt, in the order of the window.
    """

    title: str
    severity: str | None
    risk_score: float | None
    finding_ids: tuple[str, ...]

    def line(self) -> dict[str, Any]:
        """Returns the JSON object of the correlation in a prompt."""
        line: dict[str, Any] = {"title": self.title, "finding_ids": self.finding_ids}
        if self.severity:
            line["severity"] = self.severity
        if self.risk_score is not None:
            line["risk_score"] = round_number(self.risk_score)
        return line


@dataclass(slots=True)
class Window:
    """The findings of one prompt.

    Attributes:
        findings: findings in the order of the document.
        links: correlations among the findings, the riskiest first.
        whole: whether the window is the whole document.
        summaries: summaries of the document if the window is the whole document, else empty.
        ids: ids as shown in the prompt, one per finding.
    """

    findings: list[Finding]
    links: list[Link] = field(default_factory=list)
    whole: bool = False
    summaries: dict[str, Any] = field(default_factory=dict)
    ids: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = shown_ids(self.findings)

    @property
    def severity(self) -> str:
        """Highest severity of the findings; "info" if there are none."""
        return max((finding.severity for finding in self.findings), key=SEVERITIES.index, default="info")

    def ranked(self) -> list[tuple[Finding, str]]:
        """Returns the findings with their shown ids, by decreasing risk score, ties by id."""
        rows = zip(self.findings, self.ids, strict=True)
        return sorted(rows, key=lambda row: (-row[0].risk_score, row[1]))

    def own_summary(self, key: str) -> str:
        """Returns a summary of the document, truncated, if it is about exactly this window; else ""."""
        text = self.summaries.get(key)
        return truncate(text.strip(), MAX_SUMMARY) if isinstance(text, str) else ""


def iter_windows(document: Document, size: int) -> Iterator[Window]:
    """Yields the windows of a document; each finding is in exactly one window.

    Args:
        document: a document, or the part of it that belongs to one split.
        size: largest number of findings per window.
    """
    parts = _partition(document.findings, size)
    whole = len(parts) == 1
    for findings, correlations in zip(parts, _correlations_by_window(parts, document.correlations), strict=True):
        yield Window(findings, links_among(findings, correlations), whole, document.summaries if whole else {})


def _partition(findings: list[Finding], size: int) -> list[list[Finding]]:
    count = -(-len(findings) // size)
    parts: list[list[Finding]] = []
    for index in range(count):
        subset = findings[index::count]
        if index % 2 == 0 or len(subset) < MIN_FINDINGS_TO_SPLIT:
            parts.append(subset)
            continue
        # the first part has 2 to len - 2 findings, distributed over the whole subset
        first = 2 + int(index * GOLDEN_RATIO_MULTIPLIER % 1 * (len(subset) - 3))
        chosen = [position * first % len(subset) < first for position in range(len(subset))]
        parts.append(list(compress(subset, chosen)))
        parts.append(list(compress(subset, map(not_, chosen))))
    return parts


def _correlations_by_window(parts: list[list[Finding]], correlations: list[Correlation]) -> list[list[Correlation]]:
    """Returns the correlations with at least two findings in each window, in one pass over all references."""
    window_of: dict[str, int] = {}
    for window, findings in enumerate(parts):
        for finding in findings:
            window_of.setdefault(finding.id, window)
    by_window: list[list[Correlation]] = [[] for _ in parts]
    for correlation in correlations:
        present = (window_of[key] for key in dict.fromkeys(correlation.finding_ids) if key in window_of)
        for window, members in Counter(present).items():
            if members > 1:
                by_window[window].append(correlation)
    return by_window


def links_among(findings: Sequence[Finding], correlations: Iterable[Correlation]) -> list[Link]:
    """Returns the riskiest correlations among some findings, one per title.

    Args:
        findings: findings of one window.
        correlations: correlations of the document; those with fewer than two of the findings are left out.
    """
    by_id = {finding.id: (index, shown) for index, (finding, shown) in enumerate(_with_shown_ids(findings))}
    ranked = sorted(correlations, key=lambda correlation: (-(correlation.risk_score or 0), correlation.id))
    links: dict[str, Link] = {}
    for correlation in ranked:
        title = truncate(correlation.title, 80)
        members = sorted({by_id[key] for key in correlation.finding_ids if key in by_id})
        if len(members) > 1 and title not in links:
            ids = tuple(shown for _, shown in members[:MAX_LINK_IDS])
            links[title] = Link(title, correlation.severity, correlation.risk_score, ids)
            if len(links) == MAX_LINKS:
                break
    return list(links.values())


def _with_shown_ids(findings: Sequence[Finding]) -> Iterable[tuple[Finding, str]]:
    return zip(findings, shown_ids(findings), strict=True)


def shown_ids(findings: Sequence[Finding]) -> list[str]:
    """Returns the ids that a prompt shows, one per finding.

    A finding's own id is used if it is not empty, has at most ``MAX_ID`` characters and did not occur before; else f1,
    f2, ... by position. Scanners use whole paths as ids. At inference, the caller maps the ids of an answer back by
    position.
    """
    ids = [finding.id for finding in findings]
    taken = set(ids)
    if len(taken) == len(ids) and "" not in taken and max(map(len, ids), default=0) <= MAX_ID:
        return ids
    seen: set[str] = set()
    for position, shown in enumerate(list(ids), 1):
        if not shown or len(shown) > MAX_ID or shown in seen:
            shown = f"f{position}"
            while shown in taken or shown in seen:
                shown += "_"
        seen.add(shown)
        ids[position - 1] = shown
    return ids


def finding_line(finding: Finding, shown_id: str) -> dict[str, Any]:
    """Returns the JSON object of a scored finding in the prompt of a window."""
    line: dict[str, Any] = {
        "id": shown_id,
        "title": truncate(finding.title, MAX_TITLE),
        "category": truncate(finding.category, MAX_ID),
        "severity": finding.severity,
        "risk_score": round_number(finding.risk_score),
    }
    if finding.probability_actionable is not None:
        line["probability_actionable"] = round_number(finding.probability_actionable)
    if finding.baseline_status == "new":
        line["baseline_status"] = "new"
    return line


def severity_counts(window: Window) -> str:
    """Returns the counts by severity, such as "1 critical, 3 low"."""
    counts = Counter(finding.severity for finding in window.findings)
    return ", ".join(f"{counts[name]} {name}" for name in reversed(SEVERITIES) if counts[name])


def executive_summary(window: Window) -> str:
    """Returns the summary of the document for the whole document, else one that is computed from the window.

    A computed summary has the counts by severity, the titles of the highest risks, the correlations, and one
    recommendation.
    """
    if own := window.own_summary("executive_summary"):
        return own
    if not window.findings:
        return "The scan reports no findings. No action is needed."
    titles = Counter(finding.title for finding in window.findings)
    risks: dict[str, str] = {}
    for finding, _ in window.ranked():
        times = f"{titles[finding.title]} findings, highest " if titles[finding.title] > 1 else ""
        risks.setdefault(
            finding.title, f"{truncate(finding.title, 80)} ({times}risk {round_number(finding.risk_score)})"
        )
    sentences = [
        f"{_findings(len(window.findings))}: {severity_counts(window)}.",
        f"Top risks: {'; '.join(list(risks.values())[:3])}.",
    ]
    if window.links:
        linked = "; ".join(f"{link.title} ({len(link.finding_ids)} findings)" for link in window.links[:2])
        sentences.append(f"Correlated: {linked}.")
    top = truncate(window.ranked()[0][0].title, 80)
    sentences.append(ADVICE[window.severity].replace("{top}", top))
    return truncate(" ".join(sentences), MAX_SUMMARY)


def triage_summary(window: Window) -> str:
    """Returns the triage text of the document for the whole document, else one that is computed from the window.

    A computed text has the number of findings that need attention now, can be planned or can wait, and the finding to
    start with.
    """
    if own := window.own_summary("triage_summary"):
        return own
    counts = Counter(finding.severity for finding in window.findings)
    urgent = sum(counts[name] for name in URGENT)
    waiting = len(window.findings) - urgent - counts["medium"]
    verb = "needs" if 1 in (urgent, len(window.findings)) else "need"
    text = (
        f"{urgent} of {_findings(len(window.findings))} {verb} attention now; "
        f"{counts['medium']} can be planned and {waiting} can wait."
    )
    if window.findings and window.severity != "info":
        finding, shown = window.ranked()[0]
        text += f" Start with {shown}: {truncate(finding.title, 80)} (risk {round_number(finding.risk_score)})."
    return text


def _findings(count: int) -> str:
    return f"{count} finding" if count == 1 else f"{count} findings"


def top_findings(window: Window) -> list[dict[str, Any]]:
    """Returns the riskiest findings, each with a reason, with the keys of ``ground_truth_v1``."""
    rows = []
    for finding, shown in window.ranked()[:MAX_TOP]:
        row = finding_line(finding, shown)
        keys = ("id", "title", "severity", "risk_score", "probability_actionable")
        rows.append({key: row[key] for key in keys if key in row} | {"reason": _reason(finding, shown, window)})
    return rows


def _reason(finding: Finding, shown: str, window: Window) -> str:
    parts = [f"{finding.severity} severity at risk {round_number(finding.risk_score)}"]
    if finding.probability_actionable is not None:
        parts.append(f"{finding.probability_actionable:.0%} likely actionable")
    if finding.baseline_status == "new":
        parts.append("new since the baseline")
    if link := next((link for link in window.links if shown in link.finding_ids), None):
        parts.append(f"part of: {link.title}")
    return "; ".join(parts)
