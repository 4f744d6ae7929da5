"""Target answers about one finding and about one correlation, taken from a document's ground truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.records import SUBSCORES
from datamodules.tasks.base import round_number, truncate
from datamodules.tasks.schemas import MAX_RATIONALE, MAX_TAG, MAX_TAGS, MAX_TITLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datamodules.records import Correlation, Finding


def risk_answer(finding: Finding, rationale: bool = False) -> dict[str, Any]:
    """Returns the tags, the severity and the scores of a finding; a part that the document lacks is left out.

    The tags come first: they name the observations, and a model that has written them predicts the severity better.
    (With the severity first, 64 steps of the embedded default gave every finding the same one, although its tags were
    nearly right.)

    Args:
        finding: finding of the document.
        rationale: whether the answer has the finding's rationale, truncated; if there is none it is left out.
    """
    answer: dict[str, Any] = {"tags": truncate_tags(finding.tags)}
    if rationale and finding.rationale:
        answer["rationale"] = truncate(" ".join(finding.rationale), MAX_RATIONALE)
    answer |= {"severity": finding.severity, "risk_score": round_number(finding.risk_score)}
    subscores = finding.risk_subscores
    if subscores:
        answer["risk_subscores"] = {name: round(subscores[name], 2) for name in SUBSCORES if name in subscores}
    if finding.probability_actionable is not None:
        answer["probability_actionable"] = round(finding.probability_actionable, 2)
    return answer


def correlation_answer(correlation: Correlation, member_ids: Sequence[str]) -> dict[str, Any]:
    """Returns a correlation with the keys of ``ground_truth_v1``, without its id.

    Args:
        correlation: the correlation of the document.
        member_ids: ids of its findings that the prompt contains, as written in the prompt.
    """
    answer: dict[str, Any] = {"title": truncate(correlation.title, MAX_TITLE), "related_finding_ids": list(member_ids)}
    if correlation.severity:
        answer["severity"] = correlation.severity
    if correlation.risk_score is not None:
        answer["risk_score"] = round_number(correlation.risk_score)
    if correlation.risk_score_delta is not None:
        answer["risk_score_delta"] = round(correlation.risk_score_delta)
    if rationale := correlation.insight or correlation.description:
        answer["rationale"] = truncate(drop_repeated_items(rationale), MAX_RATIONALE)
    if correlation.tags:
        answer["tags"] = truncate_tags(correlation.tags)
    return answer


def drop_repeated_items(text: str) -> str:
    """Removes repeated items of a comma-separated list; real descriptions name "SELinux status" forty times."""
    return ", ".join(dict.fromkeys(text.split(", ")))


def truncate_tags(tags: Sequence[str]) -> list[str]:
    """Returns the first :data:`~datamodules.tasks.schemas.MAX_TAGS` tags, each truncated to ``MAX_TAG`` characters."""
    return [tag[:MAX_TAG] for tag in tags[:MAX_TAGS]]
