"""Tasks from the agent's own prompt templates, so that the model is trained on the prompts that the agent sends.

A template file is a JSON object. Its ``template`` is a text with the names of ``variables`` in braces, and ends with
the keys of the expected answer. The text up to the last line break before the first variable is the instruction, which
all examples share. The rest, with its variables filled, is the content. Braces that are no declared variable are not
changed, and a filled value is never searched for variables.

A template that asks for other keys raises an error. For example, ``refine_rules`` asks for better rules, which the
ground truth does not contain.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.errors import UserError, one_line
from datamodules.records import SEVERITIES
from datamodules.tasks import schemas
from datamodules.tasks.base import Pair, compact_json, round_number, truncate
from datamodules.tasks.remediation import remediate, texts
from datamodules.tasks.windows import (
    URGENT,
    Window,
    executive_summary,
    finding_line,
    iter_windows,
    severity_counts,
    top_findings,
    triage_summary,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from datamodules.records import Document
    from datamodules.tasks.base import Schema

_VERSION = re.compile(r"_v(\d+)$")
_ANSWER_KEYS = re.compile(r"\b(?:keys:|with:|containing:)\s*([^.\n]+)\.?\s*$")


def load_templates(folder: str) -> dict[str, dict[str, Any]]:
    """Loads the templates of a folder.

    Returns:
        Name without version -> JSON object of the newest version.

    Raises:
        UserError: the folder does not exist or has no template, or a file in it is not a template.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"data.agent_templates={folder}: no such folder. Fix: give the folder that contains summarize_v1.json."
        )
    newest: dict[str, tuple[int, dict[str, Any]]] = {}
    for file in sorted(path.glob("*.json")):
        try:
            template = orjson.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(
                f"data.agent_templates={folder}: {file.name} is not valid JSON ({one_line(error)}). "
                "Fix: correct or remove it."
            ) from error
        if not isinstance(template, dict) or not isinstance(template.get("template"), str):
            raise UserError(
                f"data.agent_templates={folder}: {file.name} has no text 'template'. Fix: add it or remove the file."
            )
        version = _VERSION.search(file.stem)
        name, rank = _VERSION.sub("", file.stem), int(version[1]) if version else 0
        newest[name] = max(newest.get(name, (-1, {})), (rank, template), key=lambda pair: pair[0])
    if not newest:
        raise UserError(
            f"data.agent_templates={folder}: no *.json file in this folder. Fix: give the folder of the templates."
        )
    return {name: template for name, (_, template) in newest.items()}


class AgentTask:
    """A prompt of the agent about a window of scored findings.

    Args:
        name: name of the task.
        template: JSON object of the template file.
        window: largest number of findings in a prompt.

    Raises:
        UserError: the template has a variable or asks for a key that is not supported, or its text has another form.
    """

    system = None  # the agent sends its prompts without system text and chat template

    def __init__(self, name: str, template: dict[str, Any], window: int = 24) -> None:
        self.name = name
        self.window = window
        text: str = template["template"]
        variables = template.get("variables") or []
        self._check_variables(text, variables)
        # split before any variable is filled: "{context}" in a finding is text, not a variable
        parts = re.split("({(?:" + "|".join(map(re.escape, variables)) + ")})", text)
        instruction, newline, rest = parts[0].rpartition("\n")
        if not newline:
            raise UserError(f"{name}: no line break before the template's first variable. Fix: add one.")
        self.instruction = instruction + newline
        self._parts = [rest, *parts[1:]]
        self.keys = self._parse_answer_keys(text)
        self.answer_schema = schemas.closed({key: ANSWERS[key][1] for key in self.keys})

    def _check_variables(self, text: str, variables: list[str]) -> None:
        if not variables:
            raise UserError(f"{self.name}: the template declares no 'variables'. Fix: list their names.")
        for variable in variables:
            if variable not in VARIABLES:
                raise UserError(
                    f"{self.name}: variable {variable!r} is not supported. Fix: use only {', '.join(VARIABLES)}."
                )
            if f"{{{variable}}}" not in text:
                raise UserError(
                    f"{self.name}: variable {variable!r} is declared but not in the template's text. "
                    "Fix: add or remove it."
                )

    def _parse_answer_keys(self, text: str) -> list[str]:
        listed = _ANSWER_KEYS.search(text)
        if not listed:
            raise UserError(
                f"{self.name}: the template does not end with the keys of its answer. Fix: end it with 'keys: a, b.'"
            )
        keys = [re.sub(r"\(.*?\)|^and ", "", key.strip()).strip() for key in listed[1].split(",")]
        for key in keys:
            if key not in ANSWERS:
                raise UserError(
                    f"{self.name}: the template asks for the key {key!r}, which has no target. "
                    f"Fix: ask only for {', '.join(ANSWERS)}."
                )
        return keys

    def content(self, window: Window) -> str:
        """Returns the text of the template after its instruction, with the variables filled from a window."""
        return "".join(
            compact_json(VARIABLES[part[1:-1]](window)) if index % 2 else part for index, part in enumerate(self._parts)
        )

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per window of a document."""
        for window in iter_windows(document, self.window):
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


#: variable of a template -> function that returns its value for a window
VARIABLES: dict[str, Callable[[Window], Any]] = {
    "scan_data": lambda window: {"findings": _lines(window)},
    "context": _context,
    "reductions": lambda window: {"top_findings": _lines(window)},
    "correlations": _links,
    "business_context": lambda window: {},  # not in the archive; the agent sends an empty object then
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
    """Returns the actions of the document for the whole document, else the table's first action per riskiest finding.

    Findings of severity info are left out.
    """
    if own := texts([_action_text(action) for action in window.actions], schemas.MAX_LINES):
        return own
    actions: dict[str, None] = {}
    for finding, shown in window.ranked():
        if schemas.PRIORITIES[finding.severity] != "none":
            actions.setdefault(f"{remediate(finding)['actions'][0]['title']} ({shown})")
        if len(actions) == schemas.MAX_LINES:
            break
    return list(actions) or ["No action needed; keep this state as the baseline."]


def _action_text(action: dict[str, Any]) -> str:
    """Returns title and description of an action of ``ground_truth_v1`` on one line."""
    return ": ".join(text for key in ("title", "description") if isinstance(text := action.get(key), str) and text)


_LIST = schemas.array(schemas.text(schemas.MAX_RATIONALE), schemas.MAX_LINES)

#: key of an answer -> function that returns its target for a window, and its schema
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
