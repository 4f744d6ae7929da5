"""Finds groups of findings that may be correlated, as input of the correlation task.

Four rules are applied to all findings: signs of one intrusion (a preloaded library, an SUID shell, a listener), the
same value of a field that identifies one object (a process id, a path, a port), the same title more than once above
severity info, and pairs of categories that strengthen each other (an indicator of compromise and world-writable
files). An intrusion comes first, then the riskiest groups.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from commands.analyze.assessment.intrusion_signs import INTRUSION, SIGNS, signs_of
from datamodules.records import SEVERITIES, Correlation
from datamodules.tasks.base import round_number, truncate
from datamodules.tasks.remediation import ALIASES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datamodules.records import Finding

#: metadata fields that identify one object; equal users, states or rules would group half of the host's findings
IDENTITIES = (
    "pid", "ppid", "path", "file", "exe", "executable", "command", "port", "foreign_address", "remote_ip", "domain",
    "module", "inode", "sha256", "hash",
)  # fmt: skip
#: values that identify no object
EMPTY = {"", "0", "1", "none", "null", "unknown", "0.0.0.0:0", "[::]:0", "true", "false"}
#: title of the correlation of two categories
COMBINATIONS = {
    ("ioc", "world_writable"): "Indicator of compromise together with weak file permissions",
    ("ioc", "network"): "Indicator of compromise together with network activity",
    ("ioc", "processes"): "Indicator of compromise together with suspicious processes",
    ("network", "processes"): "Suspicious processes together with network activity",
    ("mac", "world_writable"): "Weak mandatory access control together with file capabilities or weak permissions",
    ("mac", "suid"): "Weak mandatory access control together with SUID binaries",
    ("kernel_params", "modules"): "Kernel modules together with weak kernel parameters",
    ("dns", "network"): "Suspicious name resolution together with network activity",
}
VALUE = 64  #: largest number of characters of a shared value in a title


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group of findings that may be correlated.

    Attributes:
        rule: name of the rule: intrusion, shared_value, shared_title or combination.
        title: one line about the common property.
        rationale: the rule's reason as a sentence.
        positions: positions of the findings in the report, the riskiest first.
    """

    rule: str
    title: str
    rationale: str
    positions: tuple[int, ...]

    def correlation(self, key: str, findings: Sequence[Finding]) -> Correlation:
        """Returns the correlation that is reported if no valid answer of the model exists.

        Args:
            key: id of the correlation.
            findings: all findings of the report.
        """
        members = [findings[position] for position in self.positions]
        severities = [finding.severity for finding in members]
        if self.rule == INTRUSION:
            severities.append("high")  # several signs together are more than each alone
        severity = max(severities, key=SEVERITIES.index)
        return Correlation(
            id=key, title=self.title, description=self.rationale, type=self.rule, strength=None,
            finding_ids=[finding.id for finding in members], severity=severity,
            risk_score=round_number(max(finding.risk_score for finding in members)), tags=["correlation", self.rule],
        )  # fmt: skip


def find_candidates(findings: Sequence[Finding], *, max_members: int = 8, max_groups: int = 16) -> list[Candidate]:
    """Finds groups of at least two findings.

    Args:
        findings: with their final scores; their order only breaks ties.
        max_members: largest number of findings of a group; the riskiest are kept.
        max_groups: largest number of groups.

    Returns:
        The groups, the riskiest first; every set of findings occurs once.
    """
    risky = [i for i, finding in enumerate(findings) if finding.severity != "info"]
    intrusion = _intrusion(findings, max_members)
    groups = [*intrusion, *_shared_values(findings), *_shared_titles(findings, risky), *_combinations(findings, risky)]
    distinct: dict[frozenset[int], Candidate] = {}
    for rule, title, rationale, positions in groups:
        ranked = sorted(positions, key=lambda i: (-findings[i].risk_score, i))[:max_members]
        if len(ranked) > 1:
            distinct.setdefault(frozenset(ranked), Candidate(rule, title, rationale, tuple(ranked)))
    return sorted(distinct.values(), key=lambda group: _rank(group, findings))[:max_groups]


def _rank(group: Candidate, findings: Sequence[Finding]) -> tuple[bool, float, int, tuple[int, ...]]:
    risks = [findings[position].risk_score for position in group.positions]
    # the two riskiest findings decide
    return group.rule != INTRUSION, -sum(sorted(risks)[-2:]), -len(risks), group.positions


Group = tuple[str, str, str, list[int]]  #: rule, title, rationale, positions


def _intrusion(findings: Sequence[Finding], most: int) -> list[Group]:
    """Returns the findings that are signs of one intrusion if there are signs of at least two kinds.

    Args:
        findings: of the report.
        most: largest number of findings; each kind gets its riskiest one before any kind gets a second one.
    """
    by_sign: dict[str, list[int]] = {name: [] for name in SIGNS}
    for position, finding in enumerate(findings):
        for name in signs_of(finding):
            by_sign[name].append(position)
    kinds = {
        name: sorted(where, key=lambda i: (-findings[i].risk_score, i)) for name, where in by_sign.items() if where
    }
    if len(kinds) < 2:
        return []
    turns = zip_longest(*kinds.values())
    positions = list(dict.fromkeys(position for turn in turns for position in turn if position is not None))[:most]
    if len(positions) < 2:
        return []
    names = ", ".join(kinds)
    rationale = f"This host shows signs of several kinds ({names}), which known takeovers of Linux hosts combine."
    return [(INTRUSION, f"Intrusion signs: {names}", rationale, positions)]


def _shared_values(findings: Sequence[Finding]) -> list[Group]:
    positions: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, finding in enumerate(findings):
        for name in IDENTITIES:
            value = finding.metadata.get(name)
            if isinstance(value, str | int) and str(value).strip().lower() not in EMPTY:
                # a child process belongs to the group of its parent
                positions["pid" if name == "ppid" else name, str(value).strip()].append(position)
    return [
        (
            "shared_value",
            f"{len(set(where))} findings with {name} {truncate(value, VALUE)}",
            f"These findings have the same {name}, {truncate(value, VALUE)}.",
            list(dict.fromkeys(where)),
        )
        for (name, value), where in positions.items()
        if len(set(where)) > 1 and any(findings[i].severity != "info" for i in where)
    ]


def _shared_titles(findings: Sequence[Finding], risky: Sequence[int]) -> list[Group]:
    positions: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position in risky:
        positions[findings[position].category, findings[position].title].append(position)
    return [
        (
            "shared_title",
            f"{len(where)} findings of one kind: {truncate(title, VALUE)}",
            f"The scanner reports {truncate(title, VALUE)} {len(where)} times above info "
            f"in category {truncate(category, 32)}.",
            where,
        )
        for (category, title), where in positions.items()
        if len(where) > 1
    ]


def _combinations(findings: Sequence[Finding], risky: Sequence[int]) -> list[Group]:
    positions: dict[str, list[int]] = defaultdict(list)
    for position in sorted(risky, key=lambda i: (-findings[i].risk_score, i)):
        category = findings[position].category
        positions[ALIASES.get(category, category)].append(position)
    groups: list[Group] = []
    for pair, title in COMBINATIONS.items():
        both = [positions.get(category, []) for category in pair]
        if all(both):
            rationale = f"Categories {pair[0]} and {pair[1]} both have findings above info on this host."
            groups.append(("combination", title, rationale, both[0][:4] + both[1][:4]))
    return groups
