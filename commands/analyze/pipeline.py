"""A report's findings to one ``ground_truth_v1`` document: scores, correlations, summaries, triage, actions.

The model answers the tasks it was trained on. What it leaves out or gets wrong (no JSON, against the schema, an id that
is not in the report, a number that is not in its input) is replaced by a value made by rule, and counted under
``enrichment_results.model_report``. Ids, titles and scores are always copied from the findings, never from an answer;
a command is passed on only where the remediation table has it too, so that no text of a finding becomes a command.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from commands.analyze.correlation_candidates import Candidate, candidates
from commands.analyze.report_schema import (
    BY_MODEL,
    BY_RULE,
    Scored,
    correlation_record,
    enriched,
    reductions,
    score,
    severity_counts,
    severity_metrics,
    whole_number,
)
from commands.analyze.selection import one_of_each_kind, present_correlations, risky_window, unique_ids
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


class Ask(Protocol):
    """Asks a model questions, each a task and a content; see ``response_cache.CachedGenerator``."""

    def __call__(self, questions: Sequence[tuple[Task, str]], progress: Progress) -> list[Response]:
        """Returns one reply for each question, in their order."""


#: shows the progress of tasks that are asked together: called with their names and the number of questions
Show = Callable[[str, int], AbstractContextManager["Progress"]]


@dataclass
class Tally:
    """What came of the questions of one task.

    Attributes:
        asked: questions to the model.
        fallbacks: values made by rule instead, by reason.
        prompts_cut: questions whose content did not fit the model's context.
        withheld: commands that were not passed on.
    """

    asked: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    withheld: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the report; what is zero and rare is left out."""
        report: dict[str, Any] = {
            "asked": self.asked,
            "by_model": max(self.asked - self.fallbacks.total(), 0),
            "by_rule": dict(self.fallbacks),
        }
        rare = {"prompts_cut": self.prompts_cut, "commands_withheld": self.withheld}
        return report | {name: count for name, count in rare.items() if count}


@dataclass(frozen=True)
class Limits:
    """Bounds of an analysis.

    Attributes:
        actions: findings above info that get a remediation.
        correlations: groups of findings that are judged.
        window: findings that summary and triage see, the riskiest.
        members: findings of a group.
    """

    actions: int = 10
    correlations: int = 16
    window: int = 24
    members: int = 8


class Analysis:
    """One pass over a report.

    Args:
        ask: the model.
        tasks: the tasks that it answers; the rest is made by rule.
        limits: bounds.
        show: progress of each task.

    Attributes:
        tallies: what came of the questions, by task.
    """

    def __init__(
        self, ask: Ask, tasks: Sequence[str], limits: Limits | None = None, show: Show = lambda task, n: _silent()
    ) -> None:
        self.ask, self.tasks, self.limits, self.show = ask, set(tasks), limits or Limits(), show
        self.tallies: dict[str, Tally] = defaultdict(Tally)

    def __call__(self, document: Document) -> dict[str, Any]:
        """Analyses the findings of a report; its own correlations are kept.

        Returns:
            A document that validates against the ground-truth schema.
        """
        findings = self._scored(unique_ids(document.findings))
        given = present_correlations(document.correlations, findings)
        made, actions = self._made(findings, {item.id for item in given})
        correlations = [*given, *made]
        window = risky_window(findings, correlations, self.limits.window)
        executive, triage, top = self._summaries(window, findings)
        return {
            "version": "ground_truth_v1",
            "enriched_findings": enriched(findings, correlations),
            "correlations": [correlation_record(item) for item in correlations],
            "reductions": {"top_findings": top, **reductions(findings)},
            "summaries": {
                "executive_summary": executive,
                "triage_summary": triage,
                "metrics": severity_metrics(findings),
            },
            "actions": actions,
            "enrichment_results": {"model_report": {name: t.as_dict() for name, t in self.tallies.items()}},
        }

    # ------------------------------------------------------------------ the parts

    def _scored(self, findings: Sequence[Finding]) -> list[Scored]:
        task = RiskTask()
        task.answer_schema = complete(schemas.RISK)  # the document needs what training data may lack
        (answers,) = self._answers((task, [task.content(finding) for finding in findings], schemas.RISK))
        return [score(finding, answer) for finding, answer in zip(findings, answers, strict=True)]

    def _made(self, findings: Sequence[Scored], taken: set[str]) -> tuple[list[Correlation], list[dict[str, Any]]]:
        """Correlations and actions: neither waits for the other, so they are asked together."""
        correlation, remediation = CorrelationTask(self.limits.members, 0), RemediationTask()
        groups = candidates(findings, members=self.limits.members, most=self.limits.correlations)
        members = [[findings[position] for position in sorted(group.positions)] for group in groups]
        chosen = one_of_each_kind(findings, self.limits.actions)
        judged, remedied = self._answers(
            (correlation, [correlation.content(group) for group in members], correlation.answer_schema),
            (remediation, [remediation.content(finding) for finding in chosen], remediation.answer_schema),
        )
        return self._correlations(findings, taken, groups, members, judged), self._actions(chosen, remedied)

    def _correlations(
        self, findings: Sequence[Scored], taken: set[str], groups: Sequence[Candidate],
        members: Sequence[Sequence[Scored]], answers: Sequence[dict[str, Any] | None],
    ) -> list[Correlation]:  # fmt: skip
        found: dict[frozenset[str], Correlation] = {}
        names = (name for number in count(1) if (name := f"corr_{number}") not in taken)
        for group, inside, answer in zip(groups, members, answers, strict=True):
            made = self._judged(group, inside, answer, next(names), findings)
            found.setdefault(frozenset(made.finding_ids), made)
        return list(found.values())

    def _judged(
        self, group: Candidate, inside: Sequence[Scored], answer: dict[str, Any] | None, key: str,
        findings: Sequence[Scored],
    ) -> Correlation:  # fmt: skip
        by_rule = group.correlation(key, findings)
        if answer is None:
            return by_rule
        ids = dict(zip(shown_ids(inside), (finding.id for finding in inside), strict=True))
        named = list(dict.fromkeys(answer["related_finding_ids"]))
        if len(named) < 2 or any(name not in ids for name in named):
            self.tallies["correlation"].fallbacks["fewer than two ids" if len(named) < 2 else "invented id"] += 1
            return by_rule
        return replace(
            by_rule,
            title=answer["title"] or by_rule.title,
            description=answer.get("rationale") or by_rule.description,
            type=BY_MODEL,
            finding_ids=[ids[name] for name in named],
            severity=answer.get("severity", by_rule.severity),
            risk_score=answer.get("risk_score", by_rule.risk_score),
            risk_score_delta=answer.get("risk_score_delta"),
            tags=answer.get("tags") or by_rule.tags,
        )

    def _summaries(self, window: Window, findings: Sequence[Scored]) -> tuple[str, str, list[dict[str, Any]]]:
        summary, triage = SummaryTask(self.limits.window), TriageTask(self.limits.window)
        content = summary.content(window)
        asked = [content] if window.findings else []
        executive, order = executive_summary(window), {"triage_summary": triage_summary(window)}
        summarised, sorted_out = self._answers(
            (summary, asked, summary.answer_schema), (triage, asked, triage.answer_schema)
        )
        for answer in summarised:
            if answer is not None and self._faithful(summary, content, answer, {"executive_summary": executive}):
                executive = answer["executive_summary"]
        top = [row | {"id": key} for row, key in zip(top_findings(window), _top_ids(window), strict=True)]
        expected = {"triage_summary": order["triage_summary"], "top_findings": top_findings(window)}
        for answer in sorted_out:
            if answer is None or not self._faithful(triage, content, answer, expected):
                continue
            order["triage_summary"] = answer["triage_summary"]
            top = _as_chosen(answer["top_findings"], window) or top
        first = f"Of the {len(window.findings)} riskiest of {len(findings)} findings ({severity_counts(findings)}): "
        lead = "" if window.whole else first
        return lead + executive, lead + order["triage_summary"], [_with_probability(row) for row in top]

    def _faithful(self, task: Task, content: str, answer: dict[str, Any], by_rule: dict[str, Any]) -> bool:
        """Whether every number and id of an answer stands in its input or is counted from it."""
        judged = ParsedAnswer(text="", content=content, expected=by_rule, answer=answer, extracted=None, valid=True)
        faithful = bool(Faithfulness().count(judged)["faithful"]) and all(map(str.strip, _texts(answer)))
        if not faithful:
            self.tallies[task.name].fallbacks["not in the input"] += 1
        return faithful

    def _actions(self, chosen: Sequence[Finding], answers: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
        actions: list[dict[str, Any]] = []
        for finding, answer in zip(chosen, answers, strict=True):
            known = remediate(finding)
            if answer is not None and not answer["actions"]:
                self.tallies["remediation"].fallbacks["no action"] += 1
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
                    self.tallies["remediation"].withheld += 1
        return action

    # ------------------------------------------------------------------ asking

    def _answers(self, *asked: tuple[Task, list[str], Schema]) -> list[list[dict[str, Any] | None]]:
        """The model's answers to each task's contents; None for one that breaks its schema: the rule's stands in.

        Tasks are asked together: alone, each of the few answers of the later ones would cost as much as all of them.
        """
        questions: list[tuple[Task, str]] = []
        for task, contents, _ in asked:
            tally = self.tallies[task.name]
            if task.name in self.tasks:
                tally.asked += len(contents)
                questions += [(task, content) for content in contents]
            elif contents:
                tally.fallbacks["not a task of this model"] += len(contents)
        replies = iter(self._replies(questions))
        return [
            [self._read(next(replies), schema, self.tallies[task.name]) for _ in contents]
            if task.name in self.tasks
            else [None] * len(contents)
            for task, contents, schema in asked
        ]

    def _replies(self, questions: list[tuple[Task, str]]) -> list[Response]:
        if not questions:
            return []
        with self.show(", ".join(dict.fromkeys(task.name for task, _ in questions)), len(questions)) as progress:
            return self.ask(questions, progress)

    @staticmethod
    def _read(reply: Response, schema: Schema, tally: Tally) -> dict[str, Any] | None:
        tally.prompts_cut += reply.prompt_tokens_cut > 0
        answer = parse(reply.text.strip())
        if answer is not None and is_valid(answer, schema):
            return answer
        tally.fallbacks["cut at the token limit" if not reply.complete else "no valid answer"] += 1
        return None


def complete(schema: Schema) -> Schema:
    """A copy of a schema in which every property of every object is required."""
    copy = {key: complete(value) if isinstance(value, dict) else value for key, value in schema.items()}
    return copy | {"required": list(schema["properties"])} if schema.get("type") == "object" else copy


def _top_ids(window: Window) -> list[str]:
    return [finding.id for finding, _ in window.ranked()[: schemas.MAX_TOP]]


def _as_chosen(rows: Sequence[dict[str, Any]], window: Window) -> list[dict[str, Any]]:
    """The findings that an answer chose, with their own titles and scores; only the reason is the model's."""
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


def _with_probability(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"risk_score": whole_number(row["risk_score"])}


def _texts(answer: dict[str, Any]) -> Iterator[str]:
    return (value for value in answer.values() if isinstance(value, str))


def _silent() -> AbstractContextManager[Progress]:
    return nullcontext(lambda share: None)
