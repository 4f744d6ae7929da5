"""Turns the findings of a report into a ``ground_truth_v1`` document: scores, correlations, summaries, triage, actions.

The model answers the tasks that it was trained on. A missing or invalid answer (no JSON, against the schema, an id that
is not in the report, a number that is not in its input) is replaced by a value computed by rule, and counted under
``enrichment_results.model_report``. Ids, titles and scores are always copied from the findings, never from an answer. A
command of an answer is kept only if the remediation table has it too, so that no text of a finding becomes a command.

Ranking, triage, top findings and actions use the severity that ``--trust`` selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from commands.analyze.answer_collector import AnswerCollector, AnswerGenerator, ShowProgress
from commands.analyze.assessment import narrative
from commands.analyze.assessment.intrusion_signs import INTRUSION
from commands.analyze.assessment.limits import KnownLimits
from commands.analyze.assessment.narrative import Overview
from commands.analyze.assessment.scored_finding import (
    BY_MODEL,
    BY_RULE,
    ScoredFinding,
    lowered_findings,
    rank,
    score_finding,
)
from commands.analyze.assessment.trust import LEVELS, Trust, higher
from commands.analyze.correlation_candidates import Candidate, find_candidates
from commands.analyze.report_schema import (
    correlation_record,
    enriched_findings,
    reductions,
    severity_metrics,
    whole_number,
)
from commands.analyze.selection import one_of_each_kind, present_correlations, riskiest_window, unique_ids
from datamodules.records import Correlation, Document, Finding
from datamodules.tasks import CorrelationTask, RemediationTask, RiskTask, SummaryTask, TriageTask, schemas
from datamodules.tasks.base import truncate
from datamodules.tasks.remediation import commands_of_answers, remediate
from datamodules.tasks.schemas import PRIORITIES
from datamodules.tasks.windows import Window, executive_summary, shown_ids, top_findings, triage_summary
from lightning_modules.evaluation.answer_parsing import ParsedAnswer, strings
from lightning_modules.evaluation.text_metrics import Faithfulness

if TYPE_CHECKING:
    from datamodules.tasks.base import Schema, Task


@dataclass(frozen=True)
class AnalysisLimits:
    """Bounds of an analysis.

    Attributes:
        actions: number of findings above severity info that get a remediation.
        correlations: number of groups of findings that the model correlates.
        window: number of findings in the input of summary and triage, the riskiest.
        members: number of findings of a group.
    """

    actions: int = 10
    correlations: int = 16
    window: int = 24
    members: int = 8


class Analysis:
    """Analyses a report.

    Args:
        generator: the model.
        tasks: names of the tasks that the model answers; the others are answered by rule.
        limits: bounds.
        show_progress: opens the progress display of tasks; None shows nothing.
        trust: whose severities and risk scores rank the findings.
        known_limits: known limits of the model, which are noted next to the findings.
        rationale: whether the model was trained to state a rationale in answers of the risk task.

    Attributes:
        ask: asks the model, and counts questions and answers by task.
    """

    def __init__(
        self,
        generator: AnswerGenerator,
        tasks: Sequence[str],
        limits: AnalysisLimits | None = None,
        show_progress: ShowProgress | None = None,
        trust: Trust = "higher",
        known_limits: KnownLimits | None = None,
        rationale: bool = False,
    ) -> None:
        self.ask = AnswerCollector(generator, tasks, show_progress)
        self.limits, self.trust = limits or AnalysisLimits(), trust
        self.known_limits, self.rationale = known_limits or KnownLimits(), rationale

    def __call__(self, document: Document, reference: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Analyses the findings of a report; the report's own correlations are kept.

        Args:
            document: the report.
            reference: the document's ``raw_reference``: its entries ``skipped``, ``unusable`` and ``scanner_errors``
                prevent a summary that states that nothing is urgent.

        Returns:
            A document that validates against the ground-truth schema.
        """
        findings = self._score(unique_ids(document.findings))
        overview = _overview(findings, reference or {})
        reported = present_correlations(document.correlations, findings)
        new, actions = self._correlate_and_remediate(findings, {item.id for item in reported}, overview)
        correlations = [*reported, *new]
        window = riskiest_window(findings, correlations, self.limits.window)
        executive, triage, top = self._summarize(window, replace(overview, links=window.links))
        records = enriched_findings(findings, correlations)
        limits = self.known_limits.annotate(records)
        return {
            "version": "ground_truth_v1",
            "enriched_findings": records,
            "correlations": [correlation_record(item) for item in correlations],
            "reductions": {"top_findings": top, **reductions(findings)},
            "summaries": {
                "executive_summary": executive,
                "triage_summary": triage,
                "metrics": severity_metrics(findings),
            },
            "actions": actions,
            "enrichment_results": {
                "model_report": {
                    "trust": self.trust,
                    "lowered": lowered_findings(findings),
                    "known_limits": limits,
                    "answers": {name: counts.as_dict() for name, counts in self.ask.counts.items()},
                }
            },
        }

    def _score(self, findings: Sequence[Finding]) -> list[ScoredFinding]:
        task = RiskTask(self.rationale)
        schema = task.answer_schema
        task.answer_schema = require_all(schema)  # the document needs properties that training data may lack
        (answers,) = self.ask((task, [task.content(finding) for finding in findings], schema))
        return [score_finding(finding, answer, self.trust) for finding, answer in zip(findings, answers, strict=True)]

    def _correlate_and_remediate(
        self, findings: Sequence[ScoredFinding], taken: set[str], overview: Overview
    ) -> tuple[list[Correlation], list[dict[str, Any]]]:
        """Returns correlations and actions; they don't depend on each other, so that the tasks run together."""
        correlation, remediation = CorrelationTask(self.limits.members, 0), RemediationTask()
        groups = find_candidates(findings, max_members=self.limits.members, max_groups=self.limits.correlations)
        members = [[findings[position] for position in sorted(group.positions)] for group in groups]
        chosen = one_of_each_kind(findings, self.limits.actions)
        correlation_answers, remediation_answers = self.ask(
            (correlation, [correlation.content(group) for group in members], correlation.answer_schema),
            (remediation, [remediation.content(finding) for finding in chosen], remediation.answer_schema),
        )
        correlation_answers = [self._alarming("correlation", answer, overview) for answer in correlation_answers]
        correlations = self._correlations(findings, taken, groups, members, correlation_answers)
        return correlations, self._actions(chosen, remediation_answers, overview)

    def _correlations(
        self, findings: Sequence[ScoredFinding], taken: set[str], groups: Sequence[Candidate],
        members: Sequence[Sequence[ScoredFinding]], answers: Sequence[dict[str, Any] | None],
    ) -> list[Correlation]:  # fmt: skip
        distinct: dict[frozenset[str], Correlation] = {}
        names = (name for number in count(1) if (name := f"corr_{number}") not in taken)
        for group, inside, answer in zip(groups, members, answers, strict=True):
            correlation = self._correlation(group, inside, answer, next(names), findings)
            distinct.setdefault(frozenset(correlation.finding_ids), correlation)
        return list(distinct.values())

    def _correlation(
        self, group: Candidate, inside: Sequence[ScoredFinding], answer: dict[str, Any] | None, key: str,
        findings: Sequence[ScoredFinding],
    ) -> Correlation:  # fmt: skip
        by_rule = group.correlation(key, findings)
        if answer is None:
            return by_rule
        ids = dict(zip(shown_ids(inside), (finding.id for finding in inside), strict=True))
        answer_ids = list(dict.fromkeys(answer["related_finding_ids"]))
        if len(answer_ids) < 2 or any(name not in ids for name in answer_ids):
            self.ask.counts["correlation"].fallbacks[
                "fewer than two ids" if len(answer_ids) < 2 else "invented id"
            ] += 1
            return by_rule
        lowest_severity, lowest_risk = by_rule.severity or "info", by_rule.risk_score or 0
        severity, risk = answer.get("severity", lowest_severity), answer.get("risk_score", lowest_risk)
        if self.trust != "model":
            severity, risk = higher(severity, lowest_severity), max(risk, lowest_risk)
        return replace(
            by_rule,
            title=answer["title"] or by_rule.title,
            description=answer.get("rationale") or by_rule.description,
            type=BY_MODEL,
            # the members of an intrusion are facts of the report, of which the model must not drop one
            finding_ids=by_rule.finding_ids if group.rule == INTRUSION else [ids[name] for name in answer_ids],
            severity=severity,
            risk_score=risk,
            risk_score_delta=answer.get("risk_score_delta"),
            tags=answer.get("tags") or by_rule.tags,
        )

    def _alarming(
        self, task: str, answer: dict[str, Any] | None, overview: Overview, known: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Returns an answer, or None if one of its texts plays danger down while any finding is medium or above.

        Args:
            task: name of the task.
            answer: the model's valid answer; None if there is none.
            overview: all findings.
            known: answer by rule, whose texts are allowed.
        """
        allowed = set(strings(known or {}))
        texts = [] if answer is None else [text for text in strings(answer) if text not in allowed]
        if all(narrative.acceptable(text, overview) for text in texts):
            return answer
        self.ask.counts[task].fallbacks["plays the danger down"] += 1
        return None

    def _summarize(self, window: Window, overview: Overview) -> tuple[str, str, list[dict[str, Any]]]:
        summary, triage = SummaryTask(self.limits.window), TriageTask(self.limits.window)
        content = summary.content(window)
        contents = [content] if window.findings else []
        executive, triage_text = narrative.executive(overview), narrative.triage(overview)
        summary_answers, triage_answers = self.ask(
            (summary, contents, summary.answer_schema), (triage, contents, triage.answer_schema)
        )
        part = f"Of the {len(window.findings)} riskiest of {len(overview.findings)} findings: "
        part = "" if window.whole else part
        # the texts that the tasks are trained on: their counts are no invented numbers
        by_rule: dict[str, Any] = {"executive_summary": executive_summary(window)}
        for answer in summary_answers:
            if answer is not None and self._is_usable(summary, content, answer, by_rule, overview):
                text = answer["executive_summary"]
                executive = narrative.lead(overview, text) + part + text
        rows = top_rows(window, overview, {})
        by_rule = {"triage_summary": triage_summary(window), "top_findings": top_findings(window)}
        for answer in triage_answers:
            if answer is not None and self._is_usable(triage, content, answer, by_rule, overview):
                text = answer["triage_summary"]
                triage_text = narrative.lead(overview, text) + part + text
                reasons = {row["id"]: row["reason"] for row in answer["top_findings"]}
                rows = top_rows(window, overview, reasons)
        return executive, triage_text, rows

    def _is_usable(
        self, task: Task, content: str, answer: dict[str, Any], by_rule: dict[str, Any], overview: Overview
    ) -> bool:
        """Returns whether a text invents nothing and does not play danger down."""
        faithful = self._is_faithful(task, content, answer, by_rule)
        return (
            faithful
            and self._alarming(
                task.name, {name: text for name, text in answer.items() if isinstance(text, str)}, overview
            )
            is not None
        )

    def _is_faithful(self, task: Task, content: str, answer: dict[str, Any], by_rule: dict[str, Any]) -> bool:
        """Returns whether every number and id of an answer is in its input or is a count of it."""
        parsed = ParsedAnswer(text="", content=content, expected=by_rule, answer=answer, extracted=None, valid=True)
        faithful = bool(Faithfulness().count(parsed)["faithful"]) and all(map(str.strip, _texts(answer)))
        if not faithful:
            self.ask.counts[task.name].fallbacks["not in the input"] += 1
        return faithful

    def _actions(
        self, chosen: Sequence[ScoredFinding], answers: Sequence[dict[str, Any] | None], overview: Overview
    ) -> list[dict[str, Any]]:
        actions: list[dict[str, Any]] = []
        for finding, answer in zip(chosen, answers, strict=True):
            known = remediate(finding)
            if answer is not None and not answer["actions"]:
                self.ask.counts["remediation"].fallbacks["no action"] += 1
                answer = None
            answer = self._alarming("remediation", answer, overview, known)
            source = BY_RULE if answer is None else BY_MODEL
            for step in (answer or known)["actions"]:
                actions.append(self._action(step, finding, known, source) | {"id": f"action_{len(actions) + 1}"})
        return actions

    def _action(self, step: Mapping[str, str], finding: Finding, known: dict[str, Any], source: str) -> dict[str, Any]:
        action = {
            "id": "",
            "title": step["title"],
            "description": step.get("description", ""),
            "priority": PRIORITIES[finding.severity],
            "severity": finding.severity,
            "finding_ids": [finding.id],
            "reference": known.get("source", ""),
            "answered_by": source,
        }
        allowed = {
            "command": commands_of_answers(finding),  # with the needs, danger and undo of the table
            "check": {row["check"]: {"check": row["check"]} for row in known["actions"] if "check" in row},
        }
        for name, fields in allowed.items():
            if text := step.get(name):
                if text in fields:
                    action |= fields[text]
                else:
                    self.ask.counts["remediation"].withheld += 1
        return action


def require_all(schema: Schema) -> Schema:
    """Returns a copy of a schema in which every property of every object is required."""
    copy = {key: require_all(value) if isinstance(value, dict) else value for key, value in schema.items()}
    return copy | {"required": list(schema["properties"])} if schema.get("type") == "object" else copy


def _overview(findings: Sequence[ScoredFinding], reference: Mapping[str, Any]) -> Overview:
    unread = len(reference.get("unusable", ())) + len(reference.get("scanner_errors", ()))
    return Overview(sorted(findings, key=rank), (), reference.get("skipped"), unread)


def top_rows(window: Window, overview: Overview, reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the top findings with their own titles and scores; only the reason may be the model's.

    The findings are ranked by severity. Within a severity, those that the model chose come first.

    Args:
        window: the findings of the question.
        overview: all findings, ranked.
        reasons: the model's reasons by id as shown in the question, in its order.
    """
    shown = {finding.id: name for finding, name in zip(window.findings, window.ids, strict=True)}
    places = {name: place for place, name in enumerate(reasons)}
    ranked = sorted(
        (finding for finding in overview.findings if finding.id in shown),
        key=lambda f: (-LEVELS[f.severity], places.get(shown[f.id], len(places))),
    )
    rows = []
    for finding in ranked[: schemas.MAX_TOP]:
        given = reasons.get(shown[finding.id], "")
        if not given.strip() or not narrative.acceptable(given, overview):
            given = narrative.reason(finding, window.links, shown[finding.id])
        rows.append(
            {
                "id": finding.id, "title": truncate(finding.title, schemas.MAX_TITLE), "severity": finding.severity,
                "scanner_severity": finding.scanner_severity, "model_severity": finding.model_severity,
                "risk_score": whole_number(finding.risk_score),
                "probability_actionable": finding.probability_actionable, "reason": given,
            }
        )  # fmt: skip
    return rows


def _texts(answer: dict[str, Any]) -> Iterator[str]:
    return (value for value in answer.values() if isinstance(value, str))
