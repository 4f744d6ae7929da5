"""The rules that the generated answers follow, readable from a finding's inputs alone.

A finding shows four grounds. Its description says the evidence in words, its metadata say the other three in values::

    ground      where                                   reads                                              points
    evidence    last sentence of the description        expected / unusual / tampered / known-bad          0, 20, 40, 60
    privileged  user, owner, set_by or loaded_by        "root"                                             +20
    exposed     path, command, address or resolver      begins with one of ``OPEN_PLACES``                 +20
    mitigated   mitigation                              not "none"                                         -20

A kernel parameter's sentence says what the parameter protects (1 to 3 steps of 20); it counts only where
``current`` differs from ``desired``. Each step of evidence has three wordings, mildest to worst, worth -5, 0 and +5::

    score    = 10 + evidence + wording + privileged + exposed + mitigated, kept within 1..99
    severity = info below 20, low below 40, medium below 60, high below 80, critical from there
    tags     = [word for the evidence, "privileged", "exposed", "mitigated"], those that hold

and, with e the steps of evidence (0..3) and p, x, m the other grounds (0 or 1), each kept within 0..1::

    impact      = 0.10 + 0.15 e + 0.30 p                  confidence             = 0.70 + 0.08 e
    exposure    = 0.10 + 0.10 e + 0.45 x - 0.05 m         probability_actionable = score / 100 - 0.05 m
    anomaly     = 0.10 + 0.27 e                           base_severity_score    = 10 + 20 e

``baseline_status`` is "new" where ``seen_scans`` is 0, "existing" where it is more, "unknown" where it is absent; from
medium on a ``rationale`` names the grounds. No rule reads the title, and the title is drawn apart from the grounds.

Findings that share a PID or a path, not all of them as expected, correlate: see :func:`correlate`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.records import CATEGORIES, SEVERITIES

TABLES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
WORDS: dict[str, list[list[str]]] = TABLES["evidence"]  #: category -> steps of evidence -> three wordings
EVIDENCE = ("expected", "unusual", "tampered", "known_bad")  #: the first tag
WORDING_POINTS = (-5, 0, 5)
OPEN_PLACES = (
    *(directory + "/" for directory in TABLES["open_directories"]),
    *(address + ":" for address in TABLES["open_addresses"]),
    *(host.partition("{")[0] for host in TABLES["open_hosts"]),
)
PRIVILEGE_KEY = dict.fromkeys(CATEGORIES, "user") | {
    "world_writable": "owner", "suid": "owner", "kernel_params": "set_by", "modules": "loaded_by",
}  # fmt: skip
EXPOSURE_KEY = {
    "processes": "command", "network": "local_address", "kernel_params": "listen", "modules": "path",
    "world_writable": "path", "suid": "path", "ioc": "path", "mac": "listen", "dns": "resolver",
    "endpoint_behavior": "source",
}  # fmt: skip
SEVERITY_STEP = 20
RATIONALE_FROM = 40  #: noiseless score, medium
MAX_CORRELATED = 16  #: findings that one correlation may name


class Grounds(NamedTuple):
    """What a finding shows: ``evidence`` 0..3, ``wording`` 0..2, the others 0 or 1."""

    evidence: int
    wording: int
    privileged: int
    exposed: int
    mitigated: int


class Targets(NamedTuple):
    """Noiseless answer; subscores and probability in hundredths, order impact, exposure, anomaly, confidence."""

    score: int
    severity: str
    subscores: tuple[int, int, int, int]
    probability: int
    tags: tuple[str, ...]


def severity_of(score: float) -> str:
    """Severity of a score 0..100."""
    return SEVERITIES[min(int(score) // SEVERITY_STEP, 4)]


@cache  # 96 different grounds
def targets_of(grounds: Grounds) -> Targets:
    """The rules of the module's docstring."""
    e, wording, p, x, m = grounds
    score = 10 + SEVERITY_STEP * (e + p + x - m) + WORDING_POINTS[wording]
    score = min(max(score, 1), 99)
    subscores = (10 + 15 * e + 30 * p, 10 + 10 * e + 45 * x - 5 * m, 10 + 27 * e, 70 + 8 * e)
    marks = (("privileged", p), ("exposed", x), ("mitigated", m))
    tags = (EVIDENCE[e], *(name for name, holds in marks if holds))
    return Targets(score, severity_of(score), subscores, max(score - 5 * m, 0), tags)


def base_score(grounds: Grounds) -> int:
    """The scanner's own score: evidence only."""
    return 10 + SEVERITY_STEP * grounds.evidence


def rationale_of(sentence: str, grounds: Grounds) -> str:
    """One sentence that names the grounds, for findings from medium on."""
    names = ("root privileges", "open to anyone", "mitigated")
    marks = zip(names, grounds[2:], strict=True)
    return "; ".join([sentence, *(name for name, holds in marks if holds)])


_SENTENCES = {
    (category, sentence): (step, wording)
    for category, steps in WORDS.items()
    for step, sentences in enumerate(steps)
    for wording, sentence in enumerate(sentences)
}


def read_grounds(finding: dict[str, Any]) -> tuple[str, Grounds]:
    """Reads category, description and metadata of a generated finding.

    Returns:
        The sentence that holds the evidence, and the grounds.

    Raises:
        ValueError: the generator never wrote such a finding.
    """
    category, metadata = finding["category"], finding["metadata"]
    sentence = finding["description"].rpartition(". ")[2].removesuffix(".")
    try:
        evidence, wording = _SENTENCES[category, sentence]
        if category == "kernel_params" and metadata["current"] == metadata["desired"]:
            evidence = 0
        privileged = metadata[PRIVILEGE_KEY[category]] == "root"
        exposed = metadata[EXPOSURE_KEY[category]].startswith(OPEN_PLACES)
        mitigated = metadata["mitigation"] != "none"
    except KeyError as error:
        raise ValueError(f"finding {finding.get('id')!r} was not written by this generator: no {error}") from None
    return sentence, Grounds(evidence, wording, int(privileged), int(exposed), int(mitigated))


def baseline_status(metadata: dict[str, Any]) -> str:
    """Status relative to the baseline, from how many earlier scans saw the finding."""
    if "seen_scans" not in metadata:
        return "unknown"
    return "existing" if metadata["seen_scans"] else "new"


def truth(finding: dict[str, Any]) -> dict[str, Any]:
    """The noiseless answer to a generated finding, from its category, description and metadata only.

    Returns:
        ``severity``, ``risk_score`` (int), ``base_severity_score``, ``risk_subscores``, ``probability_actionable``,
        ``tags``, ``baseline_status`` and, from medium on, ``rationale``.

    Raises:
        ValueError: the generator never wrote such a finding.
    """
    sentence, grounds = read_grounds(finding)
    targets = targets_of(grounds)
    names = ("impact", "exposure", "anomaly", "confidence")
    answer = {
        "severity": targets.severity,
        "risk_score": targets.score,
        "base_severity_score": base_score(grounds),
        "risk_subscores": {name: value / 100 for name, value in zip(names, targets.subscores, strict=True)},
        "probability_actionable": targets.probability / 100,
        "tags": list(targets.tags),
        "baseline_status": baseline_status(finding["metadata"]),
    }
    if targets.score >= RATIONALE_FROM:
        answer["rationale"] = rationale_of(sentence, grounds)
    return answer


class Correlated(NamedTuple):
    """A correlation that follows from findings.

    Attributes:
        type: one of the archive's correlation types.
        shared: key ("pid" or "path") and value.
        members: indices of its findings.
        score: noiseless risk.
        delta: by how much ``score`` lies above its worst finding.
        severity: of ``score``.
        strength: 0..1.
        subscores: the highest of its findings, in hundredths.
    """

    type: str
    shared: tuple[str, str]
    members: list[int]
    score: int
    delta: int
    severity: str
    strength: float
    subscores: list[int]


def correlate(findings: Sequence[dict[str, Any]]) -> list[Correlated]:
    """Correlations that follow from the findings of one shard.

    Findings that share ``metadata.pid`` or ``metadata.path`` form a group; a group with some evidence and a known
    combination of categories is a correlation (:func:`correlation_type`). It raises its worst finding by one
    severity step; strength is 0.5 + 0.07 for each step of evidence in the group, at most 0.99.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, finding in enumerate(findings):
        metadata = finding["metadata"]
        for key in ("pid", "path"):
            if key in metadata:
                groups[key, str(metadata[key])].append(index)
    found = (_correlated(findings, shared, members) for shared, members in groups.items() if len(members) > 1)
    return [correlation for correlation in found if correlation]


def _correlated(findings: Sequence[dict[str, Any]], shared: tuple[str, str], members: list[int]) -> Correlated | None:
    members = members[:MAX_CORRELATED]
    grounds = [read_grounds(findings[index])[1] for index in members]
    evidence = [(findings[index]["category"], g.evidence) for index, g in zip(members, grounds, strict=True)]
    kind = correlation_type(shared[0], evidence)
    if kind is None:
        return None
    targets = [targets_of(g) for g in grounds]
    worst = max(target.score for target in targets)
    score = min(worst + SEVERITY_STEP, 99)
    strength = min(50 + 7 * sum(step for _, step in evidence), 99) / 100
    subscores = [max(column) for column in zip(*(target.subscores for target in targets), strict=True)]
    return Correlated(kind, shared, members, score, score - worst, severity_of(score), strength, subscores)


_TYPES = {
    ("pid", frozenset({"processes", "kernel_params"})): "kernel_process_suspicious",
    ("pid", frozenset({"modules", "kernel_params"})): "module_kernel_conflict",
    ("path", frozenset({"kernel_params"})): "weak_kernel_security",
    ("path", frozenset({"ioc", "world_writable"})): "ioc_file_permissions",
    ("path", frozenset({"ioc", "suid"})): "ioc_file_permissions",
    ("path", frozenset({"suid", "world_writable"})): "suid_world_writable",
    ("path", frozenset({"suid", "mac"})): "capabilities_weak_mac",
}


def correlation_type(key: str, members: Iterable[tuple[str, int]]) -> str | None:
    """Type of a group that shares a key, or None where it is no correlation.

    Args:
        key: ``pid`` or ``path``.
        members: category and steps of evidence of each finding.

    Returns:
        For a process and its traffic (network, dns): ``malware_c2`` where the traffic is known-bad and the process
        tampered or known-bad, ``unusual_port_usage`` where only a port is unusual and the process is expected, else
        ``process_network_suspicious``. For other combinations the one type of ``_TYPES``.
    """
    worst: dict[str, int] = {}
    for category, evidence in members:
        worst[category] = max(evidence, worst.get(category, 0))
    if not any(worst.values()):
        return None
    traffic = max(worst.get("network", 0), worst.get("dns", 0))
    if key != "pid" or "processes" not in worst or len(worst) == 1 or worst.keys() - {"processes", "network", "dns"}:
        return _TYPES.get((key, frozenset(worst)))
    if traffic == 3 and worst["processes"] >= 2:
        return "malware_c2"
    if worst["processes"] == 0 and worst.get("network") == traffic == 1:
        return "unusual_port_usage"
    return "process_network_suspicious"
