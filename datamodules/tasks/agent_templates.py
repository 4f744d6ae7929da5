"""Tasks from the agent's own prompt templates, so that the tuned model answers well where it will run.

A template file is JSON: ``template`` is a text with named ``variables`` in braces and ends by naming the keys that it
expects back. The text up to the first variable (cut at its last line break) is the task's instruction, which all
examples share; the rest with its variables filled is the content. Braces that are no declared variable stay as they
are, and a filled value is never searched for variables again.

Templates that ask for other things (``refine_rules`` wants better rules, which no ground truth holds) raise an error.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.errors import UserError
from datamodules.records import SEVERITIES
from datamodules.tasks import schemas
from datamodules.tasks.base import Pair, compact_json, round_number, truncate
from datamodules.tasks.remediation import PRIORITIES, remediate, texts
from datamodules.tasks.windows import (
    URGENT,
    Window,
    executive_summary,
    finding_line,
    severity_counts,
    top_findings,
    triage_summary,
    windows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from datamodules.records import Document
    from datamodules.tasks.base import Schema

_VERSION = re.compile(r"_v(\d+)$")
_ASKED = re.compile(r"\b(?:keys:|with:|containing:)\s*([^.\n]+)\.?\s*$")


def load_templates(folder: str) -> dict[str, dict[str, Any]]:
    """Reads a folder's templates: name without version -> the newest version's JSON object.

    Raises:
        UserError: no such folder, no template in it, or a file that is no template.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"agent_templates={folder}: no such folder; give the folder that holds summarize_v1.json")
    newest: dict[str, tuple[int, dict[str, Any]]] = {}
    for file in sorted(path.glob("*.json")):
        try:
            template = orjson.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(f"agent_templates: {file} is no JSON ({error})") from error
        if not isinstance(template, dict) or not isinstance(template.get("template"), str):
            raise UserError(f"agent_templates: {file} has no text named 'template'")
        version = _VERSION.search(file.stem)
        name, rank = _VERSION.sub("", file.stem), int(version[1]) if version else 0
        newest[name] = max(newest.get(name, (-1, {})), (rank, template), key=lambda pair: pair[0])
    if not newest:
        raise UserError(f"agent_templates={folder}: holds no *.json file")
    return {name: template for name, (_, template) in newest.items()}


class AgentTask:
    """A prompt of the agent over a window of scored findings.

    Args:
        name: name of the task.
        template: the template file's object.
        window: most findings in a prompt.

    Raises:
        UserError: the template names a variable or asks for a key that nothing here fills.
    """

    system = None  # the agent sends its prompts as they are, without system text or chat template

    def __init__(self, name: str, template: dict[str, Any], window: int = 24) -> None:
        self.name = name
        self.window = window
        text: str = template["template"]
        variables = template.get("variables") or []
        self._check_variables(text, variables)
        # split once, before anything is filled in: a finding that holds "{context}" stays text
        parts = re.split("({(?:" + "|".join(map(re.escape, variables)) + ")})", text)
        head, newline, tail = parts[0].rpartition("\n")
        if not newline:
            raise UserError(f"{name}: put the template's first variable on a line of its own")
        self.instruction = head + newline
        self._parts = [tail, *parts[1:]]
        self.keys = self._asked_keys(text)
        self.answer_schema = schemas.closed({key: ANSWERS[key][1] for key in self.keys})

    def _check_variables(self, text: str, variables: list[str]) -> None:
        if not variables:
            raise UserError(f"{self.name}: the template declares no 'variables'")
        for variable in variables:
            if variable not in VARIABLES:
                raise UserError(f"{self.name}: variable {variable!r} is not one of {', '.join(VARIABLES)}")
            if f"{{{variable}}}" not in text:
                raise UserError(f"{self.name}: variable {variable!r} is declared but not in the template's text")

    def _asked_keys(self, text: str) -> list[str]:
        asked = _ASKED.search(text)
        if not asked:
            raise UserError(f"{self.name}: the template must end by naming its answer's keys, as in 'keys: a, b.'")
        keys = [re.sub(r"\(.*?\)|^and ", "", key.strip()).strip() for key in asked[1].split(",")]
        for key in keys:
            if key not in ANSWERS:
                raise UserError(f"{self.name}: asks for the key {key!r}; targets are built for {', '.join(ANSWERS)}")
        return keys

    def content(self, window: Window) -> str:
        """Fills the template behind its instruction with a window."""
        return "".join(
            compact_json(VARIABLES[part[1:-1]](window)) if index % 2 else part for index, part in enumerate(self._parts)
        )

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per window."""
        for window in windows(document, self.window):
            answer = compact_json({key: ANSWERS[key][0](window) for key in self.keys})
            yield Pair(self.name, self.content(window), answer, window.severity, "mixed", len(window.findings))


def _lines(window: Window) -> list[dict[str, Any]]:
    return [finding_line(finding, shown) for finding, shown in zip(window.findings, window.ids, strict=True)]


def _links(window: Window) -> list[dict[str, Any]]:
    return [link.line() for link in window.links]


def _context(window: Window) -> dict[str, Any]:
    counts = Counter(finding.severity for finding in window.findings)
    by_severity = {name: counts[name] for name in reversed(SEVERITIES)}
    return {"finding_count": len(window.findings), "severity_counts": by_severity, "correlations": _links(window)}


#: what fills a template's variable
VARIABLES: dict[str, Callable[[Window], Any]] = {
    "scan_data": lambda window: {"findings": _lines(window)},
    "context": _context,
    "reductions": lambda window: {"top_findings": _lines(window)},
    "correlations": _links,
    "business_context": lambda window: {},  # the archive knows none; an empty object is what the agent sends then
}


def _key_findings(window: Window) -> list[str]:
    return [
        f"{row['id']}: {truncate(row['title'], 80)} ({row['severity']}, risk {row['risk_score']})"
        for row in top_findings(window)
    ]


def _risk_assessment(window: Window) -> str:
    level = {"critical": "High", "high": "High", "medium": "Medium"}.get(window.severity, "Low")
    highest = max((finding.risk_score for finding in window.findings), default=0)
    return f"{level}: {severity_counts(window) or 'no findings'}; highest risk score {round_number(highest)}."


def _security_posture(window: Window) -> str:
    state = {"critical": "Compromise likely", "high": "At serious risk", "medium": "Weakened"}.get(
        window.severity, "Sound"
    )
    urgent = sum(finding.severity in URGENT for finding in window.findings)
    return f"{state}: {urgent} of {len(window.findings)} findings are high or critical."


def _response_actions(window: Window) -> list[str]:
    """The document's own; or the knowledge table's first ones for the riskiest findings, the informational left out."""
    if own := texts([_told(action) for action in window.actions], schemas.MAX_LINES):
        return own
    actions: dict[str, None] = {}
    for finding, shown in window.ranked():
        if PRIORITIES[finding.severity] != "none":
            actions.setdefault(f"{remediate(finding)['actions'][0]['title']} ({shown})")
        if len(actions) == schemas.MAX_LINES:
            break
    return list(actions) or ["No action needed; keep this state as the baseline."]


def _told(action: dict[str, Any]) -> str:
    """An action of ``ground_truth_v1`` as a line."""
    return ": ".join(text for key in ("title", "description") if isinstance(text := action.get(key), str) and text)


_LIST = schemas.array(schemas.text(schemas.MAX_RATIONALE), schemas.MAX_LINES)

#: what answers a key that a template asks for: its builder and its schema
ANSWERS: dict[str, tuple[Callable[[Window], Any], Schema]] = {
    "executive_summary": (executive_summary, schemas.text(schemas.MAX_SUMMARY)),
    "key_findings": (_key_findings, _LIST),
    "risk_assessment": (_risk_assessment, schemas.text(schemas.MAX_RATIONALE)),
    "recommendations": (_response_actions, _LIST),
    "triage_summary": (triage_summary, schemas.text(schemas.MAX_SUMMARY)),
    "top_findings": (top_findings, schemas.array(schemas.TOP_FINDING, schemas.MAX_TOP)),
    "correlation_count": (lambda window: len(window.links), {"type": "integer", "minimum": 0, "maximum": 1000}),
    "security_posture": (_security_posture, schemas.text(schemas.MAX_RATIONALE)),
    "response_actions": (_response_actions, _LIST),
}
