"""The same input with another answer, inside one document: the median of the numbers stands for all."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import median

from datamodules.records import Document, Finding
from datamodules.stream.splits import input_key


def merge_conflicts(document: Document) -> tuple[Document, int]:
    """Gives findings of equal input one answer: the finding nearest to the median risk, with the median of each number.

    Args:
        document: it is not changed.

    Returns:
        The document with as many findings as before (ids and order stay; what is now a duplicate is dropped later),
        and how many findings got another answer.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, finding in enumerate(document.findings):
        groups[input_key(finding)].append(index)
    findings, merged = list(document.findings), 0
    for indices in groups.values():
        answers = [findings[i] for i in indices]
        if len(answers) == 1 or all(_answer(finding) == _answer(answers[0]) for finding in answers[1:]):
            continue
        middle = _middle(answers)
        for i in indices:
            merged += _answer(findings[i]) != _answer(middle)
            findings[i] = replace(middle, id=findings[i].id, correlation_refs=findings[i].correlation_refs)
    return replace(document, findings=findings), merged


def _answer(finding: Finding) -> tuple[object, ...]:
    """What a model is asked to tell: everything but the input, the id and the references."""
    return (
        finding.severity, finding.risk_score, finding.base_severity_score, finding.tags, finding.risk_subscores,
        finding.probability_actionable, finding.baseline_status, finding.rationale, finding.enrichment,
    )  # fmt: skip


def _middle(answers: list[Finding]) -> Finding:
    risk = median(finding.risk_score for finding in answers)
    nearest = min(answers, key=lambda finding: abs(finding.risk_score - risk))  # the first of several: deterministic
    known = [finding.probability_actionable for finding in answers if finding.probability_actionable is not None]
    subscores = {
        name: median(finding.risk_subscores[name] for finding in answers if name in finding.risk_subscores)
        for name in nearest.risk_subscores
    }
    return replace(
        nearest,
        risk_score=risk,
        base_severity_score=median(finding.base_severity_score for finding in answers),
        risk_subscores=subscores,
        probability_actionable=median(known) if known else None,
    )
