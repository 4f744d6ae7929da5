"""Tasks with the prompts that the providers of sys-scan-graph's agent (``sys-scan-agent`` 7.0.0) send.

The local provider sends one ChatML prompt and takes the answer as plain text. The chat provider sends a system text,
which describes the answer, and a JSON document as user text; it asks for a summary, for triage and for refined rules.
The instruction of these tasks is empty: the agent writes it into the system text.

The released graph sends neither correlations nor actions, although both providers accept them. The pairs of every
second window therefore have the correlations of the document, and the others have none.

Answers use only the values in the prompt. The agent lists ten findings, so that a count of all findings is not in it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datamodules.records import SEVERITIES
from datamodules.tasks import schemas
from datamodules.tasks.agent_reductions import (
    agent_findings,
    redacted_reductions,
    reductions,
    rule_suggestions,
)
from datamodules.tasks.base import Pair, compact_json, sanitize, truncate
from datamodules.tasks.windows import iter_windows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from datamodules.records import Correlation, Document, Finding
    from datamodules.tasks.base import Schema

MAX_PROMPT = 16_384  #: characters of the content of a training pair; the ten findings of a report have about 3,000
MAX_CORRELATIONS = 8  #: correlations of a training pair, the riskiest
MAX_RULES = 12  #: rules of a training pair
MAX_CONDITIONS = 4  #: conditions of a suggested rule: two words of a title, two fields of metadata

_ADVICE = {
    "critical": "Isolate the host and start incident response with {top}.",
    "high": "Investigate {top} within a day.",
    "medium": "Plan a fix for the next maintenance window, beginning with {top}.",
    "low": "Include {top} in routine hardening.",
}
_STEPS = {
    "critical": "Contain and investigate now",
    "high": "Investigate within a day",
    "medium": "Plan a fix",
    "low": "Include in routine hardening",
}
#: words in titles that do not distinguish one kind of finding from another
_GENERIC_WORDS = frozenset(
    {"binary", "detected", "file", "found", "process", "setting", "system", "unexpected", "with"}
)

TOP_FINDING: Schema = schemas.closed(
    {
        "id": schemas.text(256),
        "title": schemas.text(schemas.MAX_TITLE),
        "severity": schemas.SEVERITY,
        "risk_score": {"type": "integer", "minimum": 0, "maximum": 100},
    }
)
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 1_000_000}
TRIAGE: Schema = schemas.closed(
    {"top_findings": schemas.array(TOP_FINDING, schemas.MAX_TOP), "correlation_count": COUNT}
)
SUMMARY: Schema = schemas.closed(
    {
        "executive_summary": schemas.text(schemas.MAX_SUMMARY),
        "analyst": schemas.closed({"correlation_count": COUNT, "top_findings_count": COUNT}),
        "triage_summary": TRIAGE,
        "action_narrative": schemas.text(schemas.MAX_SUMMARY),
        "consistency_findings": schemas.array(schemas.closed({"issue": schemas.text(schemas.MAX_RATIONALE)}), 5),
        "metrics": schemas.closed({"findings_count": COUNT}),
    }
)
CONDITION: Schema = schemas.closed(
    dict.fromkeys(("field", "contains", "metadata_key", "metadata_contains"), schemas.text(256)), required=[]
)
RULES: Schema = schemas.array(
    schemas.closed(
        {
            "id": schemas.text(48),
            "title": schemas.text(schemas.MAX_TITLE * 2),
            "rationale": schemas.text(schemas.MAX_SUMMARY),
            "conditions": schemas.array(CONDITION, MAX_CONDITIONS),
            "logic": {"type": "string", "enum": ["all", "any"]},
            "risk_score_delta": {"type": "integer", "minimum": -100, "maximum": 100},
            "tags": schemas.array(schemas.text(schemas.MAX_TAG), schemas.MAX_TAGS),
        }
    ),
    MAX_RULES,
)


class AgentTask(ABC):
    """Base class of the prompts of the agent about the findings of a report.

    Args:
        window: largest number of findings of a part of a report; a pair of the whole report is added to the parts.

    Attributes:
        skipped: number of pairs that were left out because their prompt is too long, by reason.
    """

    name: str
    system: str
    instruction = ""
    answer_schema: Schema

    def __init__(self, window: int = 24) -> None:
        self.window = window
        self.skipped: Counter[str] = Counter()

    @abstractmethod
    def content(self, findings: Sequence[Finding], correlations: Sequence[Correlation] = ()) -> str:
        """Returns the user text that the agent sends about findings and correlations, without actions."""

    @abstractmethod
    def answer(self, findings: Sequence[Finding], correlations: Sequence[Correlation] = ()) -> str:
        """Returns the answer, computed from the values in the prompt."""

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per window of a document, and one of the whole document if it has several windows."""
        parts: list[tuple[Sequence[Finding], Sequence[Correlation]]] = []
        for position, window in enumerate(iter_windows(document, self.window)):
            parts.append((window.findings, _among(document, window.findings) if position % 2 else ()))
        if len(parts) > 1:
            parts.append((document.findings, ()))
        for findings, correlations in parts:
            if self.applies(findings):
                content, answer = self.content(findings, correlations), self.answer(findings, correlations)
                if len(content) > MAX_PROMPT or len(answer) > MAX_PROMPT:
                    self.skipped[f"{self.name}_too_long"] += 1
                    continue
                severity = max((finding.severity for finding in findings), key=SEVERITIES.index)
                yield Pair(self.name, content, answer, severity, "mixed", len(findings))

    def applies(self, findings: Sequence[Finding]) -> bool:
        """Returns whether the agent sends the prompt about these findings."""
        return True


class AgentLocalSummary(AgentTask):
    """The prompt of the local provider, which runs a GGUF model: a summary as plain text.

    The provider writes ChatML itself, and Python's notation of its objects. The prompt therefore equals the chat format
    of ChatML models only (SmolLM2, Qwen 2.5), see ``requires_chatml``.

    Attributes:
        requires_chatml: the tokenizer's chat template must write ChatML.
    """

    name = "agent_local_summary"
    requires_chatml = True
    system = "You are a local security analyst. Summarize these security findings.\n"
    answer_schema = schemas.text(schemas.MAX_SUMMARY)

    def content(
        self,
        findings: Sequence[Finding],
        correlations: Sequence[Correlation] = (),
        actions: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Returns the user text.

        Args:
            findings: findings of the report.
            correlations: correlations of the report.
            actions: objects with ``priority``, ``action`` and ``correlation_refs``; the released graph sends none.
        """
        reduced = sanitize_strings(reductions(agent_findings(findings)))
        fields = " ".join(f"{key}={value!r}" for key, value in reduced.items())
        links = ", ".join(_notation("Correlation", _full_correlation(item)) for item in correlations)
        steps = ", ".join(_notation("ActionItem", action) for action in actions)
        return f"Findings: {fields}\nCorrelations: [{links}]\nActions: [{steps}]\n"

    def answer(self, findings: Sequence[Finding], correlations: Sequence[Correlation] = ()) -> str:
        """Returns :func:`summary`."""
        return summary(reductions(agent_findings(findings)), correlations)


class AgentChatSummary(AgentTask):
    """The summary prompt of the chat provider: an executive summary, triage and actions as one JSON object."""

    name = "agent_chat_summary"
    system = (
        "You are a security analysis assistant. Return ONLY JSON with keys matching this schema: "
        "{executive_summary: string, analyst: object, triage_summary: object, action_narrative: string, "
        "consistency_findings: array|null, metrics: object|null}. "
        "Keep the executive_summary concise and actionable. Do not include markdown."
    )
    answer_schema = SUMMARY

    def content(
        self,
        findings: Sequence[Finding],
        correlations: Sequence[Correlation] = (),
        actions: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Returns the user text; see :meth:`AgentLocalSummary.content`."""
        keys = ("id", "title", "severity", "rationale", "related_finding_ids", "tags")
        links = [_full_correlation(item) for item in correlations]
        return _json(
            {
                "reductions": redacted_reductions(reductions(agent_findings(findings))),
                "correlations": [{key: link[key] for key in keys} for link in links],
                "actions": list(actions),
                "baseline_context_present": False,  # the graph looks up the baseline after the summary
            }
        )

    def answer(self, findings: Sequence[Finding], correlations: Sequence[Correlation] = ()) -> str:
        """Returns all keys that the prompt asks for."""
        reduced = redacted_reductions(reductions(agent_findings(findings)))
        listed = len(reduced["top_findings"])
        answer = {
            "executive_summary": summary(reduced, correlations),
            "analyst": {"correlation_count": len(correlations), "top_findings_count": listed},
            "triage_summary": triage(reduced, correlations),
            "action_narrative": steps(reduced),
            "consistency_findings": [{"issue": issue} for issue in unlisted_members(reduced, correlations)],
            "metrics": {"findings_count": listed},
        }
        return compact_json(answer)


class AgentChatTriage(AgentTask):
    """The triage prompt of the chat provider: the most important findings and the number of correlations."""

    name = "agent_chat_triage"
    system = (
        "Return ONLY JSON with keys: {top_findings: array, correlation_count: number}. "
        "top_findings should be a small list of objects with at least {title}."
    )
    answer_schema = TRIAGE

    def content(self, findings: Sequence[Finding], correlations: Sequence[Correlation] = ()) -> str:
        """Returns the user text."""
        links = [_full_correlation(item) for item in correlations]
        return _json(
            {
                "reductions": redacted_reductions(reductions(agent_findings(findings))),
                "correlations": [{key: link[key] for key in ("id", "title", "severity")} for link in links],
            }
        )

    def answer(self, findings: Sequence[Finding], correlations: Sequence[Correlation] = ()) -> str:
        """Returns the riskiest findings and the number of correlations."""
        return compact_json(triage(redacted_reductions(reductions(agent_findings(findings))), correlations))


class AgentChatRules(AgentTask):
    """The prompt of the chat provider that refines suggested correlation rules; the answer is a JSON array.

    The refined rule keeps id, title, logic and delta. Its conditions begin with the most specific one and have no word
    that many kinds of findings share; its rationale states the conditions.
    """

    name = "agent_chat_rules"
    system = (
        "You are helping refine detection rules. Return ONLY a JSON array of rule objects. "
        "Constraints: keep existing rule ids, do not invent new ids, "
        "only adjust conditions/rationale/tags for clarity and specificity."
    )
    answer_schema = RULES

    def content(
        self,
        findings: Sequence[Finding],
        correlations: Sequence[Correlation] = (),
        examples: Mapping[str, Sequence[str]] | None = None,
    ) -> str:
        """Returns the user text.

        Args:
            findings: findings of the report.
            correlations: not used; the suggestions are about findings without a correlation.
            examples: titles by rule id; the released graph sends none.
        """
        return _json({"suggestions": rule_suggestions(agent_findings(findings)), "examples": dict(examples or {})})

    def answer(self, findings: Sequence[Finding], correlations: Sequence[Correlation] = ()) -> str:
        """Returns the refined rules, in the order of the suggestions."""
        return compact_json([refined(rule) for rule in rule_suggestions(agent_findings(findings))])

    def applies(self, findings: Sequence[Finding]) -> bool:
        """Returns whether there are suggestions, and not more than :data:`MAX_RULES`."""
        return 0 < len(rule_suggestions(agent_findings(findings))) <= MAX_RULES


AGENT_TASKS: dict[str, type[AgentTask]] = {
    task.name: task for task in (AgentLocalSummary, AgentChatSummary, AgentChatTriage, AgentChatRules)
}


def summary(reduced: dict[str, Any], correlations: Sequence[Correlation]) -> str:
    """Returns an executive summary of reductions: severities, top risks, counts, correlations and one piece of advice.

    Args:
        reduced: reductions as in the prompt.
        correlations: correlations as in the prompt.
    """
    top = reduced["top_findings"]
    if not top:
        return "The report has no finding above severity info."
    counts = Counter(row["severity"] for row in top)
    levels = ", ".join(f"{counts[name]} {name}" for name in reversed(SEVERITIES) if counts[name])
    titles = Counter(row["title"] for row in top)
    risks: dict[str, str] = {}
    for row in top:
        times = f"{titles[row['title']]} findings, highest " if titles[row["title"]] > 1 else ""
        risks.setdefault(row["title"], f"{truncate(row['title'], 80)} ({times}risk {row['risk_score']})")
    sentences = [f"Riskiest findings: {levels}.", f"Top risks: {'; '.join(list(risks.values())[:3])}."]
    sentences += _count_sentences(reduced)
    if correlations:
        linked = "; ".join(f"{truncate(one.title, 80)} ({len(one.finding_ids)} findings)" for one in correlations[:2])
        sentences.append(f"Correlated: {linked}.")
    worst = max((row["severity"] for row in top), key=SEVERITIES.index)
    first = truncate(next(row["title"] for row in top if row["severity"] == worst), 80)
    sentences.append(_ADVICE[worst].replace("{top}", first))
    return truncate(" ".join(sentences), schemas.MAX_SUMMARY)


def _count_sentences(reduced: dict[str, Any]) -> Iterator[str]:
    """Yields a sentence about SUID files, listening ports and kernel modules for each that the report has."""
    if unexpected := [path for path in reduced["suid_summary"].get("unexpected_suid", []) if path]:
        shown = ", ".join(truncate(str(path), 80) for path in unexpected[:2])
        yield f"Unexpected SUID files: {len(unexpected)}, such as {shown}."
    if count := reduced["network_summary"]["listen_count"]:
        yield f"Listening sockets: {count}."
    if notable := list(dict.fromkeys(reduced["module_summary"].get("notable_modules", []))):
        yield f"Notable kernel modules: {', '.join(map(str, notable[:3]))}."


def triage(reduced: dict[str, Any], correlations: Sequence[Correlation]) -> dict[str, Any]:
    """Returns the five riskiest findings and the number of correlations."""
    rows = [
        {
            "id": truncate(row["id"], 256), "title": truncate(row["title"], schemas.MAX_TITLE),
            "severity": row["severity"], "risk_score": row["risk_score"],
        }
        for row in reduced["top_findings"][: schemas.MAX_TOP]
    ]  # fmt: skip
    return {"top_findings": rows, "correlation_count": len(correlations)}


def steps(reduced: dict[str, Any]) -> str:
    """Returns one numbered line for each of the first titles, the riskiest first."""
    first = {row["title"]: row for row in reversed(reduced["top_findings"])}
    rows = sorted(first.values(), key=lambda row: -row["risk_score"])[:3]
    lines = [
        f"{number}. {_STEPS[row['severity']]}: {truncate(row['title'], 80)} ({truncate(row['id'], 120)})"
        for number, row in enumerate(rows, 1)
    ]
    return "\n".join(lines) or "No action is needed for findings of severity info."


def unlisted_members(reduced: dict[str, Any], correlations: Sequence[Correlation]) -> list[str]:
    """Returns a sentence for each correlation that refers to findings which the prompt does not list."""
    listed = {row["id"] for row in reduced["top_findings"]}
    issues = []
    for item in correlations[: schemas.MAX_LINES]:
        if missing := sum(key not in listed for key in item.finding_ids):
            name = truncate(item.id, 80)
            issues.append(f"{missing} of {len(item.finding_ids)} findings of correlation {name} are not listed.")
    return issues


def refined(rule: dict[str, Any]) -> dict[str, Any]:
    """Returns a suggested rule with ordered conditions, without generic words, and a rationale that states them."""
    specific = [one for one in rule["conditions"] if one.get("contains") not in _GENERIC_WORDS]
    conditions = sorted(specific or rule["conditions"], key=lambda one: "contains" in one)
    stated = " and ".join(
        f"the title contains {one['contains']!r}"
        if "contains" in one
        else f"{one['metadata_key']} contains {one['metadata_contains']!r}"
        for one in conditions
    )
    rationale = f"{rule['rationale']}; matches if {stated}."
    return rule | {"rationale": rationale, "conditions": conditions, "tags": [*rule["tags"], "refined"]}


def _among(document: Document, findings: Sequence[Finding]) -> list[Correlation]:
    """Returns the riskiest correlations with at least two of the findings, limited to these findings."""
    inside = {finding.id for finding in findings}
    ranked = sorted(document.correlations, key=lambda item: (-(item.risk_score or 0), item.id))
    chosen = []
    for item in ranked:
        ids = [key for key in dict.fromkeys(item.finding_ids) if key in inside]
        if len(ids) > 1:
            chosen.append(replace(item, finding_ids=ids))
            if len(chosen) == MAX_CORRELATIONS:
                break
    return chosen


def _full_correlation(item: Correlation) -> dict[str, Any]:
    """Returns the agent's fields of a correlation, in its order."""
    fields = {
        "id": item.id,
        "title": item.title,
        "rationale": item.insight or item.description,
        "related_finding_ids": item.finding_ids,
        "risk_score_delta": round(item.risk_score_delta or 0),
        "tags": item.tags,
        "severity": item.severity,
        "predicate_hits": None,
    }
    return sanitize_strings(fields)


def _notation(name: str, fields: Mapping[str, Any]) -> str:
    """Returns an object in Python's notation: ``Correlation(id='c', ...)``."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in fields.items())})"


def _json(value: Any) -> str:
    """Returns JSON with the spaces that the agent writes; other text than ASCII is not escaped."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (UnicodeEncodeError, TypeError, ValueError):  # lone surrogates, values that JSON can't hold
        return json.dumps(sanitize(value), ensure_ascii=False)
    return text


def sanitize_strings(value: Any) -> Any:
    """Returns a copy of a value without lone surrogates; tuples stay tuples."""
    if isinstance(value, tuple):
        return tuple(map(sanitize_strings, value))
    if isinstance(value, list):
        return [sanitize_strings(item) for item in value]
    if isinstance(value, dict):
        return {sanitize_strings(key): sanitize_strings(item) for key, item in value.items()}
    return sanitize(value) if isinstance(value, str) else value
