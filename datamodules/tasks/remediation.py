"""What to do about a finding: a knowledge table per scanner category and kind of finding.

``remediation.json`` lists entries in order; in a category the first applies of which a word, and the pattern where it
has one, is found in the finding's title, description and metadata (lower case). The last entry, without words, is the
fall-back. Words are looked for first because a substring costs 0.05 us and a pattern 6 us. Each entry names its source
(benchmark section, man page, kernel documentation) and gives actions: why, a command, a check.

A value of the finding is put into a command only where it is plainly a process id, a port, an address, a name or a
path without characters that a shell would read; everything else leaves the placeholder's name (``PID``) in the
command. So text that an attacker wrote never becomes a command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.tasks.base import compact_json, truncate

if TYPE_CHECKING:
    from datamodules.records import Finding

PRIORITIES = {"info": "none", "low": "low", "medium": "medium", "high": "high", "critical": "immediate"}

#: what the scanner's reports and its version 3 schema call the categories of the archive
ALIASES = {
    "suid_sgid": "suid", "privilege_escalation_surface": "suid", "process": "processes", "network_socket": "network",
    "kernel_param": "kernel_params", "kernel_hardening": "kernel_params", "kernel_module": "modules",
    "filesystem": "world_writable",
}  # fmt: skip

MAX_HAYSTACK = 4096  #: characters of a finding that are matched
MAX_STEPS = 6  #: steps that are taken from an enriched shard
MAX_STEP_LENGTH = 240
MAX_VALUE = 96  #: characters of a value in a command

#: metadata fields that may fill a placeholder, and the only texts that they may fill it with
_VALUES = {
    "pid": (("pid",), re.compile(r"(?!1$)[1-9]\d{0,6}")),  # never 0 (a whole group) or 1 (init)
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


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table.

    Attributes:
        category: scanner category, or "any".
        kind: kind of finding; empty for the category's fall-back.
        words: one of them stands in the finding's text; empty for a fall-back.
        pattern: is found there too, or None.
        source: where the advice is from.
        actions: ``title``, ``description``, ``command``, ``check``; with placeholders such as ``{pid}``.
    """

    category: str
    kind: str
    words: tuple[str, ...]
    pattern: re.Pattern[str] | None
    source: str
    actions: tuple[dict[str, str], ...]

    def applies(self, text: str) -> bool:
        """Whether the entry is about a finding.

        Args:
            text: the finding's title, description and metadata in lower case.
        """
        for word in self.words:
            if word in text:
                return self.pattern is None or self.pattern.search(text) is not None
        return not self.words


@cache
def knowledge() -> dict[str, tuple[Entry, ...]]:
    """Reads the table once: entries by category, in order."""
    rows = orjson.loads(Path(__file__).with_suffix(".json").read_bytes())
    table: dict[str, tuple[Entry, ...]] = {}
    for row in rows:
        pattern = re.compile(row["pattern"]) if "pattern" in row else None
        words, actions = tuple(row.get("words", ())), tuple(row["actions"])
        entry = Entry(row["category"], row["kind"], words, pattern, row["source"], actions)
        table[entry.category] = (*table.get(entry.category, ()), entry)
    return table


def find_entry(finding: Finding) -> Entry:
    """Returns the entry that applies; an unknown category has the one of "any"."""
    table = knowledge()
    entries = table.get(finding.category) or table.get(ALIASES.get(finding.category, "any")) or table["any"]
    text = f"{finding.title}\n{finding.description}\n{compact_json(finding.metadata)}"[:MAX_HAYSTACK].lower()
    return next(entry for entry in entries if entry.applies(text))


def remediate(finding: Finding) -> dict[str, Any]:
    """Builds the answer for a finding: its shard's own mitigation steps, or the table's actions.

    A finding of severity info needs no change: its one action says so and how to verify it.
    """
    answer = _enriched(finding)
    if answer is not None:
        return answer
    entry = find_entry(finding)
    if finding.severity == "info":
        actions = [_no_action(entry, finding)]
    else:
        actions = [
            {key: _fill(text, finding) for key, text in action.items()} | {"priority": PRIORITIES[finding.severity]}
            for action in entry.actions
        ]
    return {"actions": actions, "source": entry.source}


def _no_action(entry: Entry, finding: Finding) -> dict[str, str]:
    return {
        "title": "No action needed",
        "description": "The finding is informational. Verify the state once and keep it as the baseline.",
        "check": _fill(entry.actions[0]["check"], finding),
        "priority": PRIORITIES["info"],
    }


def _enriched(finding: Finding) -> dict[str, Any] | None:
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
    """Returns the non-empty strings of a list (or the one string), unnumbered, bounded in number and length."""
    items = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    cleaned = [_NUMBERING.sub("", item).strip() for item in items if isinstance(item, str)]
    return [truncate(item, MAX_STEP_LENGTH) for item in cleaned if item][:most]


def _fill(text: str, finding: Finding) -> str:
    return _PLACEHOLDER.sub(lambda match: _value(match[1], finding), text) if "{" in text else text


def _value(name: str, finding: Finding) -> str:
    fields, allowed = _VALUES[name]
    candidates = [str(finding.metadata[field]) for field in fields if field in finding.metadata]
    if name == "ip":
        candidates = [candidate.rpartition(":")[0] or candidate for candidate in candidates]
    if name in _IN_TITLE and (match := _IN_TITLE[name].search(finding.title)):
        candidates.append(match[1])
    fitting = (text for text in candidates if len(text) <= MAX_VALUE and allowed.fullmatch(text))
    return next(fitting, name.upper())
