"""Answers about one finding and about one correlation, from a document's ground truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.records import SUBSCORES
from datamodules.tasks.base import round_number, truncate
from datamodules.tasks.schemas import MAX_RATIONALE, MAX_TAG, MAX_TAGS, MAX_TITLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datamodules.records import Correlation, Finding


def risk_answer(finding: Finding) -> dict[str, Any]:
    """Tags, severity and scores; a part that the document lacks is left out.

    Tags stand first: they name what was seen, and a model that has written them rates it better (with severity first,
    64 steps of the embedded default gave every finding the same one, its tags nearly right).
    """
    answer: dict[str, Any] = {"tags": truncate_tags(finding.tags)}
    answer |= {"severity": finding.severity, "risk_score": round_number(finding.risk_score)}
    subscores = finding.risk_subscores
    if subscores:
        answer["risk_subscores"] = {name: round(subscores[name], 2) for name in SUBSCORES if name in subscores}
    if finding.probability_actionable is not None:
        answer["probability_actionable"] = round(finding.probability_actionable, 2)
    return answer


def correlation_answer(correlation: Correlation, member_ids: Sequence[str]) -> dict[str, Any]:
    """A correlation in the keys of ``ground_truth_v1``, without its id.

    Args:
        correlation: what ties the findings together.
        member_ids: ids of the findings that the prompt shows, as it shows them.
    """
    answer: dict[str, Any] = {"title": truncate(correlation.title, MAX_TITLE), "related_finding_ids": list(member_ids)}
    if correlation.severity:
        answer["severity"] = correlation.severity
    if correlation.risk_score is not None:
        answer["risk_score"] = round_number(correlation.risk_score)
    if correlation.risk_score_delta is not None:
        answer["risk_score_delta"] = round(correlation.risk_score_delta)
    if rationale := correlation.insight or correlation.description:
        answer["rationale"] = truncate(without_repeats(rationale), MAX_RATIONALE)
    if correlation.tags:
        answer["tags"] = truncate_tags(correlation.tags)
    return answer


def without_repeats(text: str) -> str:
    """Drops repeated items of a comma list: real descriptions name "SELinux status" forty times."""
    return ", ".join(dict.fromkeys(text.split(", ")))


def truncate_tags(tags: Sequence[str]) -> list[str]:
    """The first tags, each of bounded length."""
    return [tag[:MAX_TAG] for tag in tags[:MAX_TAGS]]
