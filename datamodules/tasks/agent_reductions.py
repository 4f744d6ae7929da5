"""Computes the inputs of the prompts that sys-scan-graph's agent (``sys-scan-agent`` 7.0.0) sends, from findings.

The agent reads a report, drops findings of severity info, tags the rest, and reduces them to counts and a list of the
ten riskiest. Its providers send these reductions, and rule suggestions that it derives from repeated titles. The
functions of this module return the same values from :class:`~datamodules.records.Finding` objects; ``make test-agent``
compares the prompts with those of the installed agent, character for character.

The agent fails on a report in which one of the counted metadata values is a list or an object; such values are left
out here.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from datamodules.records import Finding

MAX_TOP = 10  #: findings that the agent lists
MIN_SUPPORT = 2  #: findings with the same normalised title that a rule suggestion needs
MIN_RISK = 10  #: risk score from which a finding that is neither high nor critical counts for a suggestion
MAX_EXAMPLES = 5  #: findings of a suggestion whose metadata is compared

_HOME = re.compile(r"/(home|Users)/[A-Za-z0-9_.-]+")
_TOKEN = re.compile(r"[A-Za-z0-9_]+")
_NOTABLE_MODULES = frozenset({"binfmt_misc", "br_netfilter", "bridge", "iptable_nat", "xt_MASQUERADE"})
#: words in a title -> tags that the agent adds, in its order
_TITLE_TAGS = (
    (("suid",), ("suid", "privilege_escalation")),
    (("network", "port"), ("network",)),
    (("file", "permission"), ("filesystem",)),
    (("process",), ("process",)),
)


@dataclass(frozen=True, slots=True)
class AgentFinding:
    """A finding as the agent sees it after its enrichment step.

    Attributes:
        id: id in the report.
        title: title in the report.
        severity: severity, never info.
        risk_score: risk score, a whole number.
        metadata: metadata of the report.
        tags: tags that the agent derives; those of the report are replaced.
        correlated: whether the report relates the finding to a correlation.
    """

    id: str
    title: str
    severity: str
    risk_score: int
    metadata: dict[str, Any]
    tags: list[str]
    correlated: bool

    def line(self) -> dict[str, Any]:
        """Returns the entry of the list of top findings, with the name of a home folder redacted in the title."""
        return {
            "id": self.id, "title": redact(self.title), "severity": self.severity, "risk_score": self.risk_score,
            "tags": self.tags,
        }  # fmt: skip


def agent_findings(findings: Iterable[Finding]) -> list[AgentFinding]:
    """Returns the findings above severity info, in their order, with the agent's tags."""
    return [
        AgentFinding(
            id=finding.id,
            title=finding.title,
            severity=finding.severity,
            risk_score=round(finding.risk_score),
            metadata=finding.metadata,
            tags=agent_tags(finding),
            correlated=bool(finding.correlation_refs),
        )
        for finding in findings
        if finding.severity != "info"
    ]


def agent_tags(finding: Finding) -> list[str]:
    """Returns the tags that the agent derives from severity, title and id.

    The baseline status is not looked up: the agent chooses it by an MD5 digest of id, title and severity (30 % new,
    60 % existing, 10 % unknown), so no answer may depend on it.
    """
    title = finding.title.lower()
    tags = ["high_priority"] if finding.severity in ("critical", "high") else []
    for words, added in _TITLE_TAGS:
        if any(word in title for word in words):
            tags += added
    text = f"{finding.id}:{finding.title}:{finding.severity}".encode("utf-8", "replace")
    share = int(hashlib.md5(text, usedforsecurity=False).hexdigest(), 16) % 100
    return [*tags, f"baseline:{'new' if share < 30 else 'existing' if share < 90 else 'unknown'}"]


def reductions(findings: Sequence[AgentFinding]) -> dict[str, Any]:
    """Returns the counts of modules, SUID files and listening ports, and the ten riskiest findings.

    Pairs of value and count are tuples, as in the agent: its local prompt shows Python's notation.
    """
    top = [finding.line() for finding in sorted(findings, key=lambda finding: -finding.risk_score)[:MAX_TOP]]
    return {
        "module_summary": _modules(findings),
        "suid_summary": _suid(findings),
        "network_summary": _network(findings),
        "top_findings": top,
        "top_risks": top,
    }


def redact(value: Any) -> Any:
    """Returns a copy of a value in which each string of a list or object has no user names in home paths.

    Tuples are not changed, as in the agent.
    """
    if isinstance(value, str):
        return _HOME.sub(r"/\1/<user>", value)
    if isinstance(value, list):
        return [redact(item) for item in value]
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    return value


def redacted_reductions(reduced: dict[str, Any]) -> dict[str, Any]:
    """Returns reductions as the chat provider sends them: the local prompt redacts titles only."""
    lines = [
        {key: redact(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in reduced["top_findings"]
    ]
    counts = {key: redact(reduced[key]) for key in ("module_summary", "suid_summary", "network_summary")}
    return counts | {"top_findings": lines, "top_risks": lines}


def _values(findings: Iterable[AgentFinding], key: str) -> list[Any]:
    """Returns the metadata values of a key that are neither empty nor a list or object."""
    values = (finding.metadata.get(key) for finding in findings)
    return [value for value in values if value and isinstance(value, str | int | float)]


def _modules(findings: Sequence[AgentFinding]) -> dict[str, Any]:
    modules = _values(findings, "module")
    if not modules:
        return {}
    counts = Counter(modules)
    once = [name for name, count in counts.items() if count == 1 and name not in _NOTABLE_MODULES]
    return {
        "module_count": len(modules),
        "distinct_modules": len(counts),
        "notable_modules": [name for name in modules if name in _NOTABLE_MODULES],
        "uncommon_modules": once[:10],
        "module_family_counts": Counter(_values(findings, "module_family")).most_common(10),
        "avg_rarity_score": 0.0,  # the agent reads the rarity of modules from a file that a new installation lacks
        "top_rare_modules": [],
    }


def _suid(findings: Sequence[AgentFinding]) -> dict[str, Any]:
    suid = [finding.metadata for finding in findings if finding.metadata.get("suid") == "true"]
    if not suid:
        return {}
    unexpected = [metadata.get("path") for metadata in suid if metadata.get("expected") != "true"]
    return {"suid_total": len(suid), "unexpected_suid": unexpected[:15]}


def _network(findings: Sequence[AgentFinding]) -> dict[str, Any]:
    listening = [finding for finding in findings if finding.metadata.get("state") == "LISTEN"]
    known = [finding for finding in findings if "known_good" in finding.tags]
    return {
        "listen_count": len(listening),
        "top_listen_ports": Counter(_values(listening, "port")).most_common(15),
        "known_org_count": Counter(_values(known, "remote_org")).most_common(10),
    }


def rule_suggestions(findings: Sequence[AgentFinding]) -> list[dict[str, Any]]:
    """Returns the correlation rules that the agent suggests for titles that several findings share.

    Findings count if the report does not relate them to a correlation and they are high, critical or of a risk score of
    at least :data:`MIN_RISK`. The most frequent titles come first.
    """
    groups: dict[str, list[AgentFinding]] = {}
    for finding in findings:
        if not finding.correlated and (finding.severity in ("high", "critical") or finding.risk_score >= MIN_RISK):
            groups.setdefault(_title_key(finding.title), []).append(finding)
    frequent = [(key, group) for key, group in groups.items() if len(group) >= MIN_SUPPORT]
    return [_suggestion(key, group) for key, group in sorted(frequent, key=lambda item: -len(item[1]))]


def _title_key(title: str) -> str:
    tokens = [token.lower() for token in _TOKEN.findall(title) if not token.isdigit()]
    return "_".join(tokens[:6]) or "untitled"


def _suggestion(key: str, group: Sequence[AgentFinding]) -> dict[str, Any]:
    """Returns the rule for a group of findings with the same normalised title."""
    frequency: Counter[str] = Counter()
    for finding in group:
        frequency.update({token.lower() for token in _TOKEN.findall(finding.title) if len(token) > 3})
    tokens = sorted(frequency, key=lambda token: (-frequency[token], token))[:2] or [key]
    return {
        "id": f"gap_{key[:40]}",
        "title": f"Auto Suggested: {' '.join(token.capitalize() for token in tokens)}",
        "rationale": f"Suggested from {len(group)} recurring uncorrrelated high-risk findings",  # the agent's spelling
        "conditions": [{"field": "title", "contains": token} for token in tokens] + _common_metadata(group),
        "logic": "all",
        "risk_score_delta": 5,
        "tags": ["auto_suggested", "gap_candidate"],
    }


def _common_metadata(group: Sequence[AgentFinding]) -> list[dict[str, str]]:
    """Returns at most two conditions for the metadata that the first findings of a group share."""
    first, *others = [finding.metadata for finding in group[:MAX_EXAMPLES]]
    conditions = []
    for key in sorted(first):
        value = first[key]
        if not isinstance(value, str | int | float) or len(str(value)) >= 64:
            continue
        if all(key in metadata and metadata[key] == value for metadata in others):
            conditions.append({"metadata_key": key, "metadata_contains": str(value)})
    return conditions[:2]
