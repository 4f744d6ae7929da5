"""The correlation task: which of these findings belong together, and why.

A real correlation names up to 615 findings. Its prompt shows at most ``members`` of them (the first, and others spread
over the rest; the start is drawn by a digest, so that correlations that share hundreds of findings show different ones)
among ``distractors`` findings of the document that no correlation ties to them, in the document's order.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from typing import TYPE_CHECKING

from datamodules.records import SEVERITIES
from datamodules.tasks import schemas
from datamodules.tasks.base import SYSTEM, Pair, compact_json, cut_values, round_number, truncate
from datamodules.tasks.target_answers import correlation_answer
from datamodules.tasks.windows import shown_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from datamodules.records import Correlation, Document, Finding

MAX_LINE = 640  #: characters of a finding in the prompt; beyond it values are cut
TRIES = 4  #: draws for each distractor


class CorrelationTask:
    """Which of these findings belong together, and why.

    Args:
        members: most findings of a correlation in a prompt.
        distractors: most findings beside them.

    Attributes:
        skipped: correlations without an example, by reason.
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
        """Writes scored findings, one object each."""
        ids = shown_ids(findings)
        return _content([_line(finding, shown) for finding, shown in zip(findings, ids, strict=True)])

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per correlation with two findings in the document; counts the others as skipped."""
        ties = _Ties(document)
        for correlation, members in zip(document.correlations, ties.members_of, strict=True):
            if len(members) > 1:
                yield self._pair(correlation, members, ties)
            else:
                self.skipped["no finding present" if not members else "only one finding present"] += 1

    def _pair(self, correlation: Correlation, members: list[int], ties: _Ties) -> Pair:
        seed = int.from_bytes(blake2b(correlation.id.encode("utf-8", "replace"), digest_size=8).digest(), "big")
        chosen = spread(members, self.members, seed)
        positions = sorted([*chosen, *ties.draw_free(chosen, self.distractors, seed)])
        findings = [ties.findings[position] for position in positions]
        shown, kept = shown_ids(findings), set(chosen)
        lines = [ties.line(position, name) for position, name in zip(positions, shown, strict=True)]
        ids = [name for position, name in zip(positions, shown, strict=True) if position in kept]
        severity = correlation.severity or max((finding.severity for finding in findings), key=SEVERITIES.index)
        answer = compact_json(correlation_answer(correlation, ids))
        return Pair(self.name, _content(lines), answer, severity, "correlation", len(findings))


class _Ties:
    """Which findings of a document its correlations tie together, by position.

    Attributes:
        findings: of the document.
        members_of: for each correlation, the positions of its findings that are there, without repeats.
        tied: for each position that any correlation names, the correlations that do.
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
        self.tied: dict[int, set[int]] = {}
        for index, members in enumerate(self.members_of):
            for member in members:
                self.tied.setdefault(member, set()).add(index)
        self._lines: dict[tuple[int, str], str] = {}

    def line(self, position: int, shown: str) -> str:
        """Writes a finding; it stands in hundreds of correlations, so its JSON is made once."""
        key = (position, shown)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _line(self.findings[position], shown)
        return line

    def draw_free(self, chosen: Sequence[int], most: int, seed: int) -> list[int]:
        """Draws findings that share no correlation with the chosen ones; fewer where few draws find them."""
        found: dict[int, None] = {}
        tied, count = self.tied, len(self.findings)
        for step in range(TRIES * most):
            if len(found) == most:
                break
            # a golden-ratio walk visits all parts of the document evenly
            position = ((seed + step * 0x9E3779B97F4A7C15) % 2**64 * count) >> 64
            if position in chosen:
                continue
            ties = tied.get(position)
            if ties is None or all(map(ties.isdisjoint, map(tied.__getitem__, chosen))):
                found[position] = None
        return list(found)


def _content(lines: Sequence[str]) -> str:
    return f'{{"findings":[{",".join(lines)}]}}'


def _line(finding: Finding, shown: str) -> str:
    """A scored finding; its metadata hold what ties findings: a process id, a path, a command."""
    score = {"severity": finding.severity, "risk_score": round_number(finding.risk_score)}
    record = {"title": finding.title, "description": finding.description, "category": finding.category}
    line = compact_json({"id": shown, **record, "metadata": finding.metadata, **score})
    if len(line) <= MAX_LINE:
        return line
    short = {key: truncate(text, 160) for key, text in record.items()}
    return compact_json({"id": shown, **short, "metadata": cut_values(finding.metadata, 12, 64), **score})


def spread(items: Sequence[int], most: int, seed: int) -> list[int]:
    """Picks the first item and others at even distances from a seeded start.

    Args:
        items: at least one, without repeats.
        most: how many to pick at most, 2 or more.
        seed: draws the start.
    """
    if len(items) <= most:
        return list(items)
    rest = items[1:]
    start = seed % len(rest)
    return [items[0], *(rest[(start + pick * len(rest) // (most - 1)) % len(rest)] for pick in range(most - 1))]
