"""The remediation task, and the knowledge table of its answers by subject and kind of finding.

``remediation.json`` lists the entries in order. An entry applies to a finding if one of its words is in the finding's
text (title, description, metadata and path, in lower case) and its pattern, if it has one, matches there too. The last
entry of a category has no words and is the fallback. Words are searched first because a substring search takes 0.05 us
and a pattern 6 us. :func:`find_entry` selects by the finding's text: the scanner's category only sets the order of the
search.

Each entry names its source (benchmark section, man page, kernel documentation) and has actions with a title, a reason,
a check and one or more commands, of which the first one with a value for each placeholder is used. A command has
``needs``: one distribution family (:data:`FAMILIES`) and the tools that it uses. An action whose first usable command
is for one family has one command per family. A command that can lock out the operator, stop a service or destroy
evidence has ``danger``, and ``undo``, a command, unless ``danger`` says that it cannot be undone.

:mod:`datamodules.tasks.remediation_values` inserts the values of the finding. A command without a value for a
placeholder is left out.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.tasks import schemas
from datamodules.tasks.base import SYSTEM, Pair, compact_json, finding_content, truncate
from datamodules.tasks.remediation_values import fill_placeholders, path_of_id
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

#: distribution family in ``needs`` -> names in the title of an action that has one command per family
FAMILIES = {"any": "", "debian": "Debian, Ubuntu", "rhel": "RHEL, Fedora"}

#: Folder of a command's evidence in the training targets: a new folder per run. The prompt has no id of the finding, so
#: a target with the folder of :func:`evidence_folder` could not be learned.
NEW_EVIDENCE_FOLDER = "$(sudo mktemp -d /root/evidence.XXXXXX)"

MAX_SEARCHED = 4096  #: characters of a finding that are searched for words and patterns

_BIT = r"\b(?:s[ug]id|set[ug]id)\b"
_FILE = r"\b(?:bit|binary|file|copy|shell|program|(?:ba|da|z|k)?sh)\b"
_SUID = re.compile(
    rf'{_BIT}[^"]{{0,40}}{_FILE}|{_FILE}[^"]{{0,40}}{_BIT}|"s[ug]id":"?(?:true|1)\b|[r-]ws[r-]|u\+s\b|'
    r'"(?:mode|perms?|permissions?)":"?(?:0o?)?[2467][0-7]{3}\b'
)
#: Categories whose findings are about a setuid file if :data:`_SUID` matches, although the scanner's rule was another.
_SUID_IN = frozenset({"ioc", "processes"})

_SUID_WORDS = ("suid", "sgid", "setuid", "setgid", "ws", "u+s", '"mode"', '"perm')

#: Category -> words, and pattern, of the texts that its entries treat. The categories are tried in this order after the
#: finding's own one.
_SUBJECTS = {
    "ioc": (
        ("ld_", "ld.so", "shell", "/dev/tcp/", "deleted"),
        r'ld_preload|ld\.so\.preload|ld_audit|reverse.shell|/dev/tcp/|web.?shell|\(deleted\)|"deleted\w*":"?true',
    ),
    "suid": (_SUID_WORDS, _SUID.pattern),
    "modules": (("module", "lkm", "rootkit"), r"\bkernel module|\blkm\b|\brootkit"),
    "kernel_params": (("/proc/sys/", "sysctl"), r"/proc/sys/|\bsysctl\b"),
    "mac": (("selinux", "apparmor"), r"\bselinux\b|\bapparmor\b"),
    "dns": (("dns", "nxdomain"), r"\bdns (?:query|activity|tunnel)|\bnxdomain\b"),
    "world_writable": (("writable",), r"world.writable"),
    "network": (("listen",), r"\b(?:tcp|udp)6? \d+ listening|\blisten(?:s|ing|er)?\b.{0,20}\bport\b"),
    "processes": (('"pid"',), r'"pid":"?[1-9]'),
}
_SUBJECT_PATTERNS = {category: (words, re.compile(pattern)) for category, (words, pattern) in _SUBJECTS.items()}
_NUMBERING = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s*")


class RemediationTask:
    """Recommends actions for one finding whose severity is known: each with a command and a check, and their source."""

    name = "remediation"
    system = SYSTEM
    instruction = (
        "Say how to remediate this finding. Answer with the key actions (list of objects with title, description, "
        "command, needs (distribution family, tools), danger and undo of a risky command, check and priority: none, "
        "low, medium, high or immediate) and source (benchmark section, man page or kernel documentation). Where no "
        "action is needed, say so and how to verify it.\nFinding:\n"
    )
    answer_schema = schemas.REMEDIATION

    def content(self, finding: Finding) -> str:
        """Returns the input fields of a finding, after its severity.

        The scanner reports the path of some files as the finding's id only. It is then an input field too, because the
        commands need it.
        """
        path = path_of_id(finding)
        return finding_content(finding, severity=finding.severity, **({"path": path} if path else {}))

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per finding of a document."""
        for finding in document.findings:
            answer = compact_json(remediate(finding, NEW_EVIDENCE_FOLDER))
            yield Pair(self.name, self.content(finding), answer, finding.severity, finding.category, 1)


def _matches(text: str, words: tuple[str, ...], pattern: re.Pattern[str] | None) -> bool:
    """Returns whether a text contains one of the words and, if there is a pattern, matches it."""
    for word in words:
        if word in text:
            return pattern is None or pattern.search(text) is not None
    return False


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the knowledge table.

    Attributes:
        category: scanner category, or "any".
        kind: kind of finding; empty for the fallback of the category.
        words: the finding's text must contain one of them; empty for a fallback.
        pattern: the finding's text must also match it; None for no pattern.
        source: reference for the advice.
        actions: each with ``title``, ``description``, ``check`` and ``commands``, a list of objects with ``command``,
            ``needs`` and, for a dangerous command, ``danger`` and ``undo``. The texts of ``check``, ``command`` and
            ``undo`` may contain placeholders such as ``{pid}``.
    """

    category: str
    kind: str
    words: tuple[str, ...]
    pattern: re.Pattern[str] | None
    source: str
    actions: tuple[dict[str, Any], ...]

    def applies(self, text: str) -> bool:
        """Returns whether the entry applies to a finding.

        Args:
            text: title, description, metadata and path of the finding, in lower case.
        """
        return not self.words or _matches(text, self.words, self.pattern)


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
    """Returns the entry that applies to a finding.

    The entries are searched in this order: those for setuid files if the finding of a process or an indicator is about
    one; those of the finding's category; those of each other category whose subject the text names. If no entry with
    words applies, the fallback of the finding's category is returned, for an unknown category that of the first subject
    or of "any".
    """
    table = knowledge()
    path = path_of_id(finding) or ""
    fields = f"{finding.title}\n{finding.description}\n{compact_json(finding.metadata)}"[:MAX_SEARCHED]
    text = f'{fields}\n"{path}"'.lower()
    own = ALIASES.get(finding.category, finding.category)
    categories = ["suid"] if own in _SUID_IN and _matches(text, _SUID_WORDS, _SUID) else []
    categories += [own] if own in table else []
    entry = _specific_entry(categories, text)
    if entry is None:
        subjects = [category for category, rule in _SUBJECT_PATTERNS.items() if _matches(text, *rule)]
        entry = _specific_entry(subjects, text) or table[[*categories, *subjects, "any"][0]][-1]
    return entry


def _specific_entry(categories: list[str], text: str) -> Entry | None:
    entries = (entry for category in categories for entry in knowledge()[category][:-1])
    return next((entry for entry in entries if entry.applies(text)), None)


def evidence_folder(finding: Finding) -> str:
    """Returns the folder on the host for the evidence of one finding; it differs between findings of different ids."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", finding.id)[:32].strip("-") or "finding"
    return f"/root/evidence/{name}-{hashlib.sha256(finding.id.encode('utf-8', 'replace')).hexdigest()[:12]}"


def remediate(finding: Finding, evidence: str | None = None) -> dict[str, Any]:
    """Returns the answer for a finding: the mitigation steps of its shard, or the actions of the table.

    A finding of severity info needs no change: its only action states this and how to verify it.

    Args:
        finding: a finding with its severity.
        evidence: folder in the commands that copy evidence, as shell text; :func:`evidence_folder` if None.
    """
    answer = _answer_from_enrichment(finding)
    if answer is not None:
        return answer
    entry = find_entry(finding)
    evidence = evidence or evidence_folder(finding)
    if finding.severity == "info":
        actions = [_no_action(entry, finding, evidence)]
    else:
        actions = [filled for action in entry.actions for filled in _fill_action(action, finding, evidence)]
        # An action without a command helps only if no other action is left.
        actions = [action for action in actions if "command" in action] or actions[:1]
    return {"actions": actions, "source": entry.source}


def commands_of_answers(finding: Finding) -> dict[str, dict[str, Any]]:
    """Returns the commands that an answer of the model may have for a finding.

    Returns:
        command -> ``command``, ``needs``, ``danger`` and ``undo`` of the table, with the evidence folder of the
        finding. The keys are the command with that folder and the command of the training targets.
    """
    known: dict[str, dict[str, Any]] = {}
    learned = remediate(finding, NEW_EVIDENCE_FOLDER)["actions"]
    for action, target in zip(remediate(finding)["actions"], learned, strict=True):
        if "command" in action:
            fields = {key: action[key] for key in ("command", "needs", "danger", "undo") if key in action}
            known[action["command"]] = known[target["command"]] = fields
    return known


def _no_action(entry: Entry, finding: Finding, evidence: str) -> dict[str, Any]:
    checks = (fill_placeholders(action["check"], finding, evidence) for action in entry.actions)
    check = next((check for check in checks if check), None)
    return {
        "title": "No action needed",
        "description": "The finding is informational. Verify the state once and keep it as the baseline.",
        **({"check": check} if check else {}),
        "priority": PRIORITIES["info"],
    }


def _fill_action(action: dict[str, Any], finding: Finding, evidence: str) -> list[dict[str, Any]]:
    """Returns an action with its command, without one if no command can be filled, or one action per family."""
    check = fill_placeholders(action["check"], finding, evidence)
    commands = _choose_commands(action["commands"], finding, evidence)
    filled = []
    for command in commands or [{}]:
        family = FAMILIES[command["needs"][0]] if command else ""
        title = f"{action['title']} ({family})" if family else action["title"]
        fields = {"title": title, "description": action["description"], **command}
        fields |= {"check": check} if check else {}
        filled.append(fields | {"priority": PRIORITIES[finding.severity]})
    return filled


def _choose_commands(commands: list[dict[str, Any]], finding: Finding, evidence: str) -> list[dict[str, Any]]:
    """Returns the first command with a value for each placeholder, or the first one of each distribution family."""
    chosen: dict[str, dict[str, Any]] = {}
    for command in commands:
        family = command["needs"][0]
        if "any" in chosen or family in chosen or (chosen and family == "any"):
            continue
        filled = dict(command)
        for key in {"command", "undo"} & command.keys():
            filled[key] = fill_placeholders(command[key], finding, evidence)
        if None not in filled.values():
            chosen[family] = filled
    return list(chosen.values())


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
