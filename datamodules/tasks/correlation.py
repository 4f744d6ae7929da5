"""The correlation task: find the findings that belong together, and give the reason.

A real correlation refers to up to 615 findings. Its prompt has at most ``members`` of them: the first one, and others
at even distances among the rest. A digest of the correlation's id chooses the start, so that correlations that share
hundreds of findings show different ones. In addition, the prompt has ``distractors`` findings of the document that
share no correlation with these. All findings are in the order of the document.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from typing import TYPE_CHECKING

from datamodules.records import SEVERITIES
from datamodules.tasks import schemas
from datamodules.tasks.base import SYSTEM, Pair, compact_json, round_number, truncate, truncate_values
from datamodules.tasks.target_answers import correlation_answer
from datamodules.tasks.windows import shown_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from datamodules.records import Correlation, Document, Finding

MAX_LINE = 640  #: characters of a finding in the prompt; values of longer findings are truncated
DRAWS_PER_DISTRACTOR = 4


class CorrelationTask:
    """Finds the findings that belong together, and gives the reason.

    Args:
        members: largest number of a correlation's findings in a prompt.
        distractors: largest number of other findings in a prompt.

    Attributes:
        skipped: number of correlations without an example, by reason.
    """

    name = "correlation"
    system = SYSTEM
    instruction = (
        "Find the findings below that belong together. Answer with the keys title, related_finding_ids (ids from the "
        "list only), severity (info, low, medium, high or critical), risk_score (0 to 100), rationale (why they belong "
        "together) and tags (list of strings).\nFindings:\n"
    )

    def __init__(self, members: int = 8, distractors: int = 4) -> None:
        self.members = members
        self.distractors = distractors
        self.answer_schema = schemas.correlation(members)
        self.skipped: Counter[str] = Counter()

    def content(self, findings: Sequence[Finding]) -> str:
        """Returns scored findings, one object each, as compact JSON."""
        ids = shown_ids(findings)
        return _content([_line(finding, shown) for finding, shown in zip(findings, ids, strict=True)])

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per correlation that has two findings in the document; counts the others in ``skipped``."""
        index = _CorrelationIndex(document)
        for correlation, members in zip(document.correlations, index.members_of, strict=True):
            if len(members) > 1:
                yield self._pair(correlation, members, index)
            else:
                self.skipped["no finding present" if not members else "only one finding present"] += 1

    def _pair(self, correlation: Correlation, members: list[int], index: _CorrelationIndex) -> Pair:
        seed = int.from_bytes(blake2b(correlation.id.encode("utf-8", "replace"), digest_size=8).digest(), "big")
        chosen = pick_evenly(members, self.members, seed)
        positions = sorted([*chosen, *index.draw_unrelated(chosen, self.distractors, seed)])
        findings = [index.findings[position] for position in positions]
        shown, kept = shown_ids(findings), set(chosen)
        lines = [index.line(position, name) for position, name in zip(positions, shown, strict=True)]
        ids = [name for position, name in zip(positions, shown, strict=True) if position in kept]
        severity = correlation.severity or max((finding.severity for finding in findings), key=SEVERITIES.index)
        answer = compact_json(correlation_answer(correlation, ids))
        return Pair(self.name, _content(lines), answer, severity, "correlation", len(findings))


class _CorrelationIndex:
    """The findings of each correlation of a document, and the correlations of each finding, by position.

    Attributes:
        findings: findings of the document.
        members_of: for each correlation, the positions of its findings that the document has, without repeats.
        correlations_of: position of a finding -> indices of its correlations; findings without one are absent.
    """

    def __init__(self, document: Document) -> None:
        self.findings = document.findings
        position_of: dict[str, int] = {}
        for position, finding in enumerate(document.findings):
            position_of.setdefault(finding.id, position)
        self.members_of = [
            [position_of[key] for key in dict.fromkeys(correlation.finding_ids) if key in position_of]
            for correlation in document.correlations
        ]
        self.correlations_of: dict[int, set[int]] = {}
        for index, members in enumerate(self.members_of):
            for member in members:
                self.correlations_of.setdefault(member, set()).add(index)
        self._lines: dict[tuple[int, str], str] = {}

    def line(self, position: int, shown: str) -> str:
        """Returns a finding as JSON. A finding can be in hundreds of correlations, so the text is cached."""
        key = (position, shown)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _line(self.findings[position], shown)
        return line

    def draw_unrelated(self, chosen: Sequence[int], most: int, seed: int) -> list[int]:
        """Returns positions of findings that share no correlation with the chosen ones.

        The number of draws is bounded, so that there may be fewer than ``most``.
        """
        drawn: dict[int, None] = {}
        correlations_of, count = self.correlations_of, len(self.findings)
        for step in range(DRAWS_PER_DISTRACTOR * most):
            if len(drawn) == most:
                break
            # steps of 2^64 times the golden ratio's fraction visit all parts of the document evenly
            position = ((seed + step * 0x9E3779B97F4A7C15) % 2**64 * count) >> 64
            if position in chosen:
                continue
            own = correlations_of.get(position)
            if own is None or all(map(own.isdisjoint, map(correlations_of.__getitem__, chosen))):
                drawn[position] = None
        return list(drawn)


def _content(lines: Sequence[str]) -> str:
    return f'{{"findings":[{",".join(lines)}]}}'


def _line(finding: Finding, shown: str) -> str:
    """Returns a scored finding as JSON, with the metadata that findings can share: a process id, a path, a command."""
    score = {"severity": finding.severity, "risk_score": round_number(finding.risk_score)}
    record = {"title": finding.title, "description": finding.description, "category": finding.category}
    line = compact_json({"id": shown, **record, "metadata": finding.metadata, **score})
    if len(line) <= MAX_LINE:
        return line
    short = {key: truncate(text, 160) for key, text in record.items()}
    return compact_json({"id": shown, **short, "metadata": truncate_values(finding.metadata, 12, 64), **score})


def pick_evenly(items: Sequence[int], most: int, seed: int) -> list[int]:
    """Returns the first item, and others at even distances.

    Args:
        items: at least one item, without repeats.
        most: largest number of items to return, 2 or more.
        seed: determines the first of the other items.
    """
    if len(items) <= most:
        return list(items)
    rest = items[1:]
    start = seed % len(rest)
    return [items[0], *(rest[(start + pick * len(rest) // (most - 1)) % len(rest)] for pick in range(most - 1))]
