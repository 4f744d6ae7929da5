"""The risk task: predict severity, scores and tags of one finding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.tasks import schemas
from datamodules.tasks.base import SYSTEM, Pair, compact_json, finding_content
from datamodules.tasks.target_answers import risk_answer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datamodules.records import Document, Finding


class RiskTask:
    """Predicts tags, severity, risk score, subscores and the probability of action of one finding.

    Args:
        rationale: whether the answer also states the reasons, before the severity. A finding without a rationale has an
            answer without one.
    """

    name = "risk"
    system = SYSTEM
    answer_schema = schemas.RISK

    def __init__(self, rationale: bool = False) -> None:
        self.rationale = rationale
        reasons = "rationale (the reasons in one or two sentences), " if rationale else ""
        self.instruction = (
            f"Assess the risk of this finding. Answer with the keys tags (list of strings), {reasons}"
            "severity (info, low, medium, high or critical), risk_score (0 to 100), "
            "risk_subscores (impact, exposure, anomaly, confidence, each 0 to 1) "
            "and probability_actionable (0 to 1).\nFinding:\n"
        )
        if rationale:
            self.answer_schema = schemas.RISK_WITH_RATIONALE

    def content(self, finding: Finding) -> str:
        """Returns the input fields of a finding; its severity, scores and tags are not read."""
        return finding_content(finding)

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per finding of a document."""
        for finding in document.findings:
            answer = compact_json(risk_answer(finding, self.rationale))
            yield Pair(self.name, self.content(finding), answer, finding.severity, finding.category, 1)
