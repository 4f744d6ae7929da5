"""The remediation task, and the knowledge table of its answers by scanner category and kind of finding.

``remediation.json`` lists the entries in order. The first entry of the finding's category applies that has a word in
the finding's title, description and metadata (in lower case) and whose pattern, if it has one, matches there too. The
last entry of a category has no words and is the fallback. Words are searched first because a substring search takes
0.05 us and a pattern 6 us. Each entry names its source (benchmark section, man page, kernel documentation) and gives
actions, each with a reason, a command and a check.

A value of the finding is inserted into a command only if it is plainly a process id, a port, an address, a name or a
path without characters that a shell interprets. Any other value leaves the placeholder's name (``PID``) in the command,
so that text that an attacker wrote never becomes part of a command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.tasks import schemas
from datamodules.tasks.base import SYSTEM, Pair, compact_json, finding_content, truncate
from datamodules.tasks.schemas import MAX_STEP_LENGTH, MAX_STEPS, PRIORITIES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datamodules.records import Document, Finding

#: other names of the archive's categories, in the scanner's reports and in its schema of version 3
ALIASES = {
    "suid_sgid": "suid", "privilege_escalation_surface": "suid", "process": "processes", "network_socket": "network",
    "kernel_param": "kernel_params", "kernel_hardening": "kernel_params", "kernel_module": "modules",
    "filesystem": "world_writable",
}  # fmt: skip

MAX_SEARCHED = 4096  #: characters of a finding that are searched for words and patterns
MAX_VALUE = 96  #: characters of a value in a command

#: placeholder: the metadata fields that may fill it, and the pattern that the whole value must match
_VALUES = {
    "pid": (("pid",), re.compile(r"(?!1$)[1-9]\d{0,6}")),  # never 0 (a whole process group) or 1 (init)
    "port": (("port",), re.compile(r"[1-9]\d{0,4}")),
    "ip": (("foreign_address", "remote_ip", "ip"), re.compile(r"(?!0\.|127\.)\d{1,3}(?:\.\d{1,3}){3}")),
    "client_ip": (("client_ip",), re.compile(r"(?!0\.|127\.)\d{1,3}(?:\.\d{1,3}){3}")),
    "domain": (("domain", "query"), re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?", re.IGNORECASE)),
    "user": (("account", "user"), re.compile(r"(?!root$)[a-z_][a-z0-9_-]{0,31}")),
    "module": (("module",), re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,55}")),
    "path": (("path", "file"), re.compile(r"(?!.*\.\.)(?:/[A-Za-z0-9._+][A-Za-z0-9._+-]{0,63}){2,8}")),
    "parameter": (("parameter", "key"), re.compile(r"[a-z][a-z0-9_.-]{2,63}")),
}
_PLACEHOLDER = re.compile("{(" + "|".join(_VALUES) + ")}")
_IN_TITLE = {
    "port": re.compile(r"\b(?:port|tcp|udp) (\d+)\b", re.IGNORECASE),
    "module": re.compile(r"\bmodule (\S+)$", re.IGNORECASE),
    "path": re.compile(r"(?:^|\s)(/\S+)"),
    "parameter": re.compile(r"^(?:/\S*/)?([^/\s]+)$"),
}
_NUMBERING = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s*")


class RemediationTask:
    """Recommends actions for one finding whose severity is known: each with a command and a check, and their source."""

    name = "remediation"
    system = SYSTEM
    instruction = (
        "Say how to remediate this finding. Answer with the key actions (list of objects with title, description, "
        "command, check and priority: none, low, medium, high or immediate) and source (benchmark section, man page or "
        "kernel documentation). Where no action is needed, say so and how to verify it.\nFinding:\n"
    )
    answer_schema = schemas.REMEDIATION

    def content(self, finding: Finding) -> str:
        """Returns the input fields of a finding, after its severity."""
        return finding_content(finding, severity=finding.severity)

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per finding of a document."""
        for finding in document.findings:
            answer = compact_json(remediate(finding))
            yield Pair(self.name, self.content(finding), answer, finding.severity, finding.category, 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the knowledge table.

    Attributes:
        category: scanner category, or "any".
        kind: kind of finding; empty for the fallback of the category.
        words: the finding's text must contain one of them; empty for a fallback.
        pattern: the finding's text must also match it; None for no pattern.
        source: reference for the advice.
        actions: each with ``title``, ``description``, ``command`` and ``check``, which may contain placeholders such as
            ``{pid}``.
    """

    category: str
    kind: str
    words: tuple[str, ...]
    pattern: re.Pattern[str] | None
    source: str
    actions: tuple[dict[str, str], ...]

    def applies(self, text: str) -> bool:
        """Returns whether the entry applies to a finding.

        Args:
            text: title, description and metadata of the finding, in lower case.
        """
        for word in self.words:
            if word in text:
                return self.pattern is None or self.pattern.search(text) is not None
        return not self.words


@cache
def knowledge() -> dict[str, tuple[Entry, ...]]:
    """Loads the table once per process; returns the entries by category, in order."""
    rows = orjson.loads(Path(__file__).with_suffix(".json").read_bytes())
    table: dict[str, tuple[Entry, ...]] = {}
    for row in rows:
        pattern = re.compile(row["pattern"]) if "pattern" in row else None
        words, actions = tuple(row.get("words", ())), tuple(row["actions"])
        entry = Entry(row["category"], row["kind"], words, pattern, row["source"], actions)
        table[entry.category] = (*table.get(entry.category, ()), entry)
    return table


def find_entry(finding: Finding) -> Entry:
    """Returns the entry that applies to a finding; an unknown category uses the entries of "any"."""
    table = knowledge()
    entries = table.get(finding.category) or table.get(ALIASES.get(finding.category, "any")) or table["any"]
    text = f"{finding.title}\n{finding.description}\n{compact_json(finding.metadata)}"[:MAX_SEARCHED].lower()
    return next(entry for entry in entries if entry.applies(text))


def remediate(finding: Finding) -> dict[str, Any]:
    """Returns the answer for a finding: the mitigation steps of its shard, or the actions of the table.

    A finding of severity info needs no change: its only action states this and how to verify it.
    """
    answer = _answer_from_enrichment(finding)
    if answer is not None:
        return answer
    entry = find_entry(finding)
    if finding.severity == "info":
        actions = [_no_action(entry, finding)]
    else:
        actions = [
            {key: _fill_placeholders(text, finding) for key, text in action.items()}
            | {"priority": PRIORITIES[finding.severity]}
            for action in entry.actions
        ]
    return {"actions": actions, "source": entry.source}


def _no_action(entry: Entry, finding: Finding) -> dict[str, str]:
    return {
        "title": "No action needed",
        "description": "The finding is informational. Verify the state once and keep it as the baseline.",
        "check": _fill_placeholders(entry.actions[0]["check"], finding),
        "priority": PRIORITIES["info"],
    }


def _answer_from_enrichment(finding: Finding) -> dict[str, Any] | None:
    steps = texts(finding.enrichment.get("mitigation_steps"), MAX_STEPS)
    if not steps:
        return None
    priority = "low" if finding.severity == "info" else PRIORITIES[finding.severity]
    answer: dict[str, Any] = {"actions": [_step(step, priority) for step in steps]}
    if vectors := texts(finding.enrichment.get("attack_vectors"), MAX_STEPS):
        answer["attack_vectors"] = vectors
    if impact := texts([finding.enrichment.get("business_impact")], 1):
        answer["business_impact"] = impact[0]
    return answer


def _step(step: str, priority: str) -> dict[str, str]:
    title = truncate(step, 80)
    return {"title": title, **({"description": step} if title != step else {}), "priority": priority}


def texts(value: Any, most: int) -> list[str]:
    """Returns the non-empty strings of a list, without numbering.

    Args:
        value: a list, or one string; other values give an empty list, and items that are not strings are skipped.
        most: largest number of strings; each is truncated to ``MAX_STEP_LENGTH`` characters.
    """
    items = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    cleaned = [_NUMBERING.sub("", item).strip() for item in items if isinstance(item, str)]
    return [truncate(item, MAX_STEP_LENGTH) for item in cleaned if item][:most]


def _fill_placeholders(text: str, finding: Finding) -> str:
    return _PLACEHOLDER.sub(lambda match: _placeholder_value(match[1], finding), text) if "{" in text else text


def _placeholder_value(name: str, finding: Finding) -> str:
    fields, allowed = _VALUES[name]
    candidates = [str(finding.metadata[field]) for field in fields if field in finding.metadata]
    if name == "ip":
        candidates = [candidate.rpartition(":")[0] or candidate for candidate in candidates]
    if name in _IN_TITLE and (match := _IN_TITLE[name].search(finding.title)):
        candidates.append(match[1])
    safe = (text for text in candidates if len(text) <= MAX_VALUE and allowed.fullmatch(text))
    return next(safe, name.upper())
