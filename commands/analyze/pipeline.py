"""Turns the findings of a report into a ``ground_truth_v1`` document: scores, correlations, summaries, triage, actions.

The model answers the tasks that it was trained on. A missing or invalid answer (no JSON, against the schema, an id that
is not in the report, a number that is not in its input) is replaced by a value computed by rule, and counted under
``enrichment_results.model_report``. Ids, titles and scores are always copied from the findings, never from an answer. A
command of an answer is kept only if the remediation table has it too, so that no text of a finding becomes a command.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from commands.analyze.correlation_candidates import Candidate, find_candidates
from commands.analyze.report_schema import (
    BY_MODEL,
    BY_RULE,
    ScoredFinding,
    correlation_record,
    enriched_findings,
    reductions,
    score_finding,
    severity_counts,
    severity_metrics,
    whole_number,
)
from commands.analyze.selection import one_of_each_kind, present_correlations, riskiest_window, unique_ids
from datamodules.records import Correlation, Document, Finding
from datamodules.tasks import CorrelationTask, RemediationTask, RiskTask, SummaryTask, TriageTask, schemas
from datamodules.tasks.base import truncate
from datamodules.tasks.remediation import remediate
from datamodules.tasks.schemas import PRIORITIES, is_valid
from datamodules.tasks.windows import Window, executive_summary, shown_ids, top_findings, triage_summary
from lightning_modules.evaluation.answer_parsing import ParsedAnswer, parse
from lightning_modules.evaluation.text_metrics import Faithfulness

if TYPE_CHECKING:
    from datamodules.tasks.base import Schema, Task
    from lightning_modules.generation.response_cache import Progress, Response


class AnswerGenerator(Protocol):
    """A model that answers questions, for example a ``response_cache.CachedGenerator``."""

    def __call__(self, questions: Sequence[tuple[Task, str]], progress: Progress) -> list[Response]:
        """Returns one response for each question (task and content), in the same order."""


#: opens a progress display for tasks that run together; called with their names and the number of questions
ShowProgress = Callable[[str, int], AbstractContextManager["Progress"]]


@dataclass
class TaskCounts:
    """Counts of the questions and answers of one task.

    Attributes:
        asked: questions to the model.
        fallbacks: values computed by rule instead of an answer, by reason.
        prompts_cut: questions whose content did not fit the model's context.
        withheld: commands that were removed from answers.
    """

    asked: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    withheld: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts for the document; rare ones are left out if they are zero."""
        report: dict[str, Any] = {
            "asked": self.asked,
            "by_model": max(self.asked - self.fallbacks.total(), 0),
            "by_rule": dict(self.fallbacks),
        }
        rare = {"prompts_cut": self.prompts_cut, "commands_withheld": self.withheld}
        return report | {name: count for name, count in rare.items() if count}


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
        show_progress: opens the progress display of tasks.
        rationale: whether the model was trained to state a rationale in answers of the risk task.

    Attributes:
        counts: counts of questions and answers by task.
    """

    def __init__(
        self,
        generator: AnswerGenerator,
        tasks: Sequence[str],
        limits: AnalysisLimits | None = None,
        show_progress: ShowProgress = lambda names, count: _no_progress(),
        rationale: bool = False,
    ) -> None:
        self.rationale = rationale
        self.generator, self.tasks, self.show_progress = generator, set(tasks), show_progress
        self.limits = limits or AnalysisLimits()
        self.counts: dict[str, TaskCounts] = defaultdict(TaskCounts)

    def __call__(self, document: Document) -> dict[str, Any]:
        """Analyses the findings of a report; the report's own correlations are kept.

        Args:
            document: the report.

        Returns:
            A document that validates against the ground-truth schema.
        """
        findings = self._score(unique_ids(document.findings))
        reported = present_correlations(document.correlations, findings)
        new, actions = self._correlate_and_remediate(findings, {item.id for item in reported})
        correlations = [*reported, *new]
        window = riskiest_window(findings, correlations, self.limits.window)
        executive, triage, top = self._summarize(window, findings)
        return {
            "version": "ground_truth_v1",
            "enriched_findings": enriched_findings(findings, correlations),
            "correlations": [correlation_record(item) for item in correlations],
            "reductions": {"top_findings": top, **reductions(findings)},
            "summaries": {
                "executive_summary": executive,
                "triage_summary": triage,
                "metrics": severity_metrics(findings),
            },
            "actions": actions,
            "enrichment_results": {"model_report": {name: counts.as_dict() for name, counts in self.counts.items()}},
        }

    def _score(self, findings: Sequence[Finding]) -> list[ScoredFinding]:
        task = RiskTask(self.rationale)
        schema = task.answer_schema
        task.answer_schema = require_all(schema)  # the document needs properties that training data may lack
        (answers,) = self._answers((task, [task.content(finding) for finding in findings], schema))
        return [score_finding(finding, answer) for finding, answer in zip(findings, answers, strict=True)]

    def _correlate_and_remediate(
        self, findings: Sequence[ScoredFinding], taken: set[str]
    ) -> tuple[list[Correlation], list[dict[str, Any]]]:
        """Returns correlations and actions; they don't depend on each other, so that the tasks run together."""
        correlation, remediation = CorrelationTask(self.limits.members, 0), RemediationTask()
        groups = find_candidates(findings, max_members=self.limits.members, max_groups=self.limits.correlations)
        members = [[findings[position] for position in sorted(group.positions)] for group in groups]
        chosen = one_of_each_kind(findings, self.limits.actions)
        correlation_answers, remediation_answers = self._answers(
            (correlation, [correlation.content(group) for group in members], correlation.answer_schema),
            (remediation, [remediation.content(finding) for finding in chosen], remediation.answer_schema),
        )
        correlations = self._correlations(findings, taken, groups, members, correlation_answers)
        return correlations, self._actions(chosen, remediation_answers)

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
            self.counts["correlation"].fallbacks["fewer than two ids" if len(answer_ids) < 2 else "invented id"] += 1
            return by_rule
        return replace(
            by_rule,
            title=answer["title"] or by_rule.title,
            description=answer.get("rationale") or by_rule.description,
            type=BY_MODEL,
            finding_ids=[ids[name] for name in answer_ids],
            severity=answer.get("severity", by_rule.severity),
            risk_score=answer.get("risk_score", by_rule.risk_score),
            risk_score_delta=answer.get("risk_score_delta"),
            tags=answer.get("tags") or by_rule.tags,
        )

    def _summarize(self, window: Window, findings: Sequence[ScoredFinding]) -> tuple[str, str, list[dict[str, Any]]]:
        summary, triage = SummaryTask(self.limits.window), TriageTask(self.limits.window)
        content = summary.content(window)
        contents = [content] if window.findings else []
        executive, triage_text = executive_summary(window), triage_summary(window)
        summary_answers, triage_answers = self._answers(
            (summary, contents, summary.answer_schema), (triage, contents, triage.answer_schema)
        )
        for answer in summary_answers:
            if answer is not None and self._is_faithful(summary, content, answer, {"executive_summary": executive}):
                executive = answer["executive_summary"]
        top = [row | {"id": key} for row, key in zip(top_findings(window), _top_ids(window), strict=True)]
        by_rule = {"triage_summary": triage_text, "top_findings": top_findings(window)}
        for answer in triage_answers:
            if answer is None or not self._is_faithful(triage, content, answer, by_rule):
                continue
            triage_text = answer["triage_summary"]
            top = _chosen_findings(answer["top_findings"], window) or top
        part = f"Of the {len(window.findings)} riskiest of {len(findings)} findings ({severity_counts(findings)}): "
        lead = "" if window.whole else part
        rows = [row | {"risk_score": whole_number(row["risk_score"])} for row in top]
        return lead + executive, lead + triage_text, rows

    def _is_faithful(self, task: Task, content: str, answer: dict[str, Any], by_rule: dict[str, Any]) -> bool:
        """Returns whether every number and id of an answer is in its input or is a count of it."""
        parsed = ParsedAnswer(text="", content=content, expected=by_rule, answer=answer, extracted=None, valid=True)
        faithful = bool(Faithfulness().count(parsed)["faithful"]) and all(map(str.strip, _texts(answer)))
        if not faithful:
            self.counts[task.name].fallbacks["not in the input"] += 1
        return faithful

    def _actions(self, chosen: Sequence[Finding], answers: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
        actions: list[dict[str, Any]] = []
        for finding, answer in zip(chosen, answers, strict=True):
            known = remediate(finding)
            if answer is not None and not answer["actions"]:
                self.counts["remediation"].fallbacks["no action"] += 1
                answer = None
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
        for name in ("command", "check"):
            if text := step.get(name):
                if text in {row.get(name) for row in known["actions"]}:
                    action[name] = text
                else:
                    self.counts["remediation"].withheld += 1
        return action

    def _answers(self, *asked: tuple[Task, list[str], Schema]) -> list[list[dict[str, Any] | None]]:
        """Returns the model's answers to the contents of each task; None for an answer that its schema does not allow.

        The tasks run together in one batch: the later tasks have few questions, and a batch of few takes as long as a
        full one.

        Args:
            *asked: task, contents and schema of the answers.
        """
        questions: list[tuple[Task, str]] = []
        for task, contents, _ in asked:
            counts = self.counts[task.name]
            if task.name in self.tasks:
                counts.asked += len(contents)
                questions += [(task, content) for content in contents]
            elif contents:
                counts.fallbacks["not a task of this model"] += len(contents)
        responses = iter(self._responses(questions))
        return [
            [self._parse(next(responses), schema, self.counts[task.name]) for _ in contents]
            if task.name in self.tasks
            else [None] * len(contents)
            for task, contents, schema in asked
        ]

    def _responses(self, questions: list[tuple[Task, str]]) -> list[Response]:
        if not questions:
            return []
        names = ", ".join(dict.fromkeys(task.name for task, _ in questions))
        with self.show_progress(names, len(questions)) as progress:
            return self.generator(questions, progress)

    @staticmethod
    def _parse(response: Response, schema: Schema, counts: TaskCounts) -> dict[str, Any] | None:
        counts.prompts_cut += response.prompt_tokens_cut > 0
        answer = parse(response.text.strip())
        if answer is not None and is_valid(answer, schema):
            return answer
        counts.fallbacks["cut at the token limit" if not response.complete else "no valid answer"] += 1
        return None


def require_all(schema: Schema) -> Schema:
    """Returns a copy of a schema in which every property of every object is required."""
    copy = {key: require_all(value) if isinstance(value, dict) else value for key, value in schema.items()}
    return copy | {"required": list(schema["properties"])} if schema.get("type") == "object" else copy


def _top_ids(window: Window) -> list[str]:
    return [finding.id for finding, _ in window.ranked()[: schemas.MAX_TOP]]


def _chosen_findings(rows: Sequence[dict[str, Any]], window: Window) -> list[dict[str, Any]]:
    """Returns the findings that an answer chose with their own titles and scores; only the reason is the model's."""
    known = {shown: finding for finding, shown in window.ranked()}
    chosen = {row["id"]: row["reason"] for row in rows if row["id"] in known}
    return [
        {
            "id": known[shown].id, "title": truncate(known[shown].title, schemas.MAX_TITLE),
            "severity": known[shown].severity, "risk_score": known[shown].risk_score,
            "probability_actionable": known[shown].probability_actionable, "reason": reason,
        }
        for shown, reason in chosen.items()
    ]  # fmt: skip


def _texts(answer: dict[str, Any]) -> Iterator[str]:
    return (value for value in answer.values() if isinstance(value, str))


def _no_progress() -> AbstractContextManager[Progress]:
    return nullcontext(lambda share: None)
