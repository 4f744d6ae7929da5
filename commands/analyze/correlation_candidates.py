"""Which findings of a report may belong together: groups found by rule, for the correlation task to judge.

Three rules, each over all findings: the same value of a field that names one thing (a process id, a path, a port), the
same title more than once above info, and pairs of categories that strengthen each other (an indicator of compromise
beside world-writable files). No group is inside another of the same rule; the riskiest groups come first.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datamodules.records import SEVERITIES, Correlation
from datamodules.tasks.base import round_number, truncate
from datamodules.tasks.remediation import ALIASES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datamodules.records import Finding

#: metadata fields whose equal values name one thing; a user, a state or a rule would tie half the host together
IDENTITIES = (
    "pid", "ppid", "path", "file", "exe", "executable", "command", "port", "foreign_address", "remote_ip", "domain",
    "module", "inode", "sha256", "hash",
)  # fmt: skip
EMPTY = {"", "0", "1", "none", "null", "unknown", "0.0.0.0:0", "[::]:0", "true", "false"}
COMBINATIONS = {  # what the two say together
    ("ioc", "world_writable"): "Indicator of compromise beside weak file permissions",
    ("ioc", "network"): "Indicator of compromise beside network activity",
    ("ioc", "processes"): "Indicator of compromise beside suspicious processes",
    ("network", "processes"): "Suspicious processes beside network activity",
    ("mac", "world_writable"): "Weak mandatory access control beside file capabilities or weak permissions",
    ("mac", "suid"): "Weak mandatory access control beside SUID binaries",
    ("kernel_params", "modules"): "Kernel modules beside weak kernel parameters",
    ("dns", "network"): "Suspicious name resolution beside network activity",
}
VALUE = 64  #: characters of a shared value in a title


@dataclass(frozen=True, slots=True)
class Candidate:
    """Findings that may belong together.

    Attributes:
        rule: shared_value, shared_title or combination.
        title: what ties them.
        rationale: the rule in words.
        positions: of the findings, the riskiest first.
    """

    rule: str
    title: str
    rationale: str
    positions: tuple[int, ...]

    def correlation(self, key: str, findings: Sequence[Finding]) -> Correlation:
        """The correlation that stands for the group where no model judges it.

        Args:
            key: its id.
            findings: of the report.
        """
        members = [findings[position] for position in self.positions]
        severity = max((finding.severity for finding in members), key=SEVERITIES.index)
        return Correlation(
            id=key, title=self.title, description=self.rationale, type=self.rule, strength=None,
            finding_ids=[finding.id for finding in members], severity=severity,
            risk_score=round_number(max(finding.risk_score for finding in members)), tags=["correlation", self.rule],
        )  # fmt: skip


def candidates(findings: Sequence[Finding], *, members: int = 8, most: int = 16) -> list[Candidate]:
    """Finds groups of at least two findings.

    Args:
        findings: scored; order matters for nothing but ties.
        members: most findings of a group, the riskiest are kept.
        most: how many groups at most.

    Returns:
        The groups, the riskiest first, each set of findings once.
    """
    risky = [i for i, finding in enumerate(findings) if finding.severity != "info"]
    groups = [*_shared_values(findings), *_shared_titles(findings, risky), *_combinations(findings, risky)]
    found: dict[frozenset[int], Candidate] = {}
    for rule, title, rationale, positions in groups:
        ranked = sorted(positions, key=lambda i: (-findings[i].risk_score, i))[:members]
        if len(ranked) > 1:
            found.setdefault(frozenset(ranked), Candidate(rule, title, rationale, tuple(ranked)))
    return sorted(found.values(), key=lambda group: _rank(group, findings))[:most]


def _rank(group: Candidate, findings: Sequence[Finding]) -> tuple[float, int, tuple[int, ...]]:
    risks = [findings[position].risk_score for position in group.positions]
    return -sum(sorted(risks)[-2:]), -len(risks), group.positions  # of a pair that counts, both matter


Group = tuple[str, str, str, list[int]]


def _shared_values(findings: Sequence[Finding]) -> list[Group]:
    positions: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, finding in enumerate(findings):
        for name in IDENTITIES:
            value = finding.metadata.get(name)
            if isinstance(value, str | int) and str(value).strip().lower() not in EMPTY:
                # a parent's id ties a child to it
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
