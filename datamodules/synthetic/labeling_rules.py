"""The rules that define the labels of a generated finding as a function of its inputs.

A finding has four features. Its description expresses the evidence in words, and its metadata express the other three
as values::

    feature     location                                value                                              points
    evidence    last sentence of the description        expected / unusual / tampered / known-bad          0, 20, 40, 60
    privileged  user, owner, set_by or loaded_by        "root"                                             +20
    exposed     path, command, address or resolver      begins with one of ``OPEN_PLACES``                 +20
    mitigated   mitigation                              not "none"                                         -20

The sentence of a kernel parameter names the kind of protection (1 to 3 steps of 20 points); the points count only if
``current`` differs from ``desired``. Each step of evidence has three wordings, from mild to severe, of -5, 0 and +5
points::

    score    = 10 + evidence + wording + privileged + exposed + mitigated, clipped to 1..99
    severity = info below 20, low below 40, medium below 60, high below 80, critical from there
    tags     = [word for the evidence, "privileged", "exposed", "mitigated"], those that apply

With e the steps of evidence (0..3) and p, x, m the other features (0 or 1), and each result clipped to 0..1::

    impact      = 0.10 + 0.15 e + 0.30 p                  confidence             = 0.70 + 0.08 e
    exposure    = 0.10 + 0.10 e + 0.45 x - 0.05 m         probability_actionable = score / 100 - 0.05 m
    anomaly     = 0.10 + 0.27 e                           base_severity_score    = 10 + 20 e

``baseline_status`` is "new" if ``seen_scans`` is 0, "existing" if it is larger, "unknown" if it is absent. Findings of
severity medium and higher have a ``rationale``, which names the features. No rule reads the title, and the title is
drawn independently of the features.

Findings that share a PID or a path correlate if one of them has evidence beyond "expected"; see :func:`correlate`.
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
EVIDENCE = ("expected", "unusual", "tampered", "known_bad")  #: the first tag, by steps of evidence
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
RATIONALE_FROM = 40  #: lowest noiseless score of a finding with a rationale (severity medium)
MAX_CORRELATION_MEMBERS = 16


class Features(NamedTuple):
    """Features that determine the labels: ``evidence`` 0..3, ``wording`` 0..2, the others 0 or 1."""

    evidence: int
    wording: int
    privileged: int
    exposed: int
    mitigated: int


class Labels(NamedTuple):
    """Noiseless labels; subscores (impact, exposure, anomaly, confidence) and probability are in hundredths."""

    score: int
    severity: str
    subscores: tuple[int, int, int, int]
    probability: int
    tags: tuple[str, ...]


def severity_of(score: float) -> str:
    """Returns the severity of a risk score from 0 to 100."""
    return SEVERITIES[min(int(score) // SEVERITY_STEP, 4)]


@cache  # there are 96 combinations
def labels_of(features: Features) -> Labels:
    """Returns the noiseless labels, by the formulas of the module's docstring."""
    e, wording, p, x, m = features
    score = 10 + SEVERITY_STEP * (e + p + x - m) + WORDING_POINTS[wording]
    score = min(max(score, 1), 99)
    subscores = (10 + 15 * e + 30 * p, 10 + 10 * e + 45 * x - 5 * m, 10 + 27 * e, 70 + 8 * e)
    flags = (("privileged", p), ("exposed", x), ("mitigated", m))
    tags = (EVIDENCE[e], *(name for name, applies in flags if applies))
    return Labels(score, severity_of(score), subscores, max(score - 5 * m, 0), tags)


def base_score(features: Features) -> int:
    """Returns the score that the scanner itself reports, which depends on the evidence only."""
    return 10 + SEVERITY_STEP * features.evidence


def rationale_of(sentence: str, features: Features) -> str:
    """Returns the rationale of a finding of severity medium or higher: the evidence and the features that apply."""
    names = ("root privileges", "open to anyone", "mitigated")
    flags = zip(names, features[2:], strict=True)
    return "; ".join([sentence, *(name for name, applies in flags if applies)])


_SENTENCES = {
    (category, sentence): (step, wording)
    for category, steps in WORDS.items()
    for step, sentences in enumerate(steps)
    for wording, sentence in enumerate(sentences)
}


def extract_features(finding: dict[str, Any]) -> tuple[str, Features]:
    """Extracts the features from category, description and metadata of a generated finding.

    Returns:
        The sentence with the evidence, and the features.

    Raises:
        ValueError: the finding was not written by this generator.
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
        raise ValueError(f"finding {finding.get('id')!r} was not written by this generator: missing {error}") from None
    return sentence, Features(evidence, wording, int(privileged), int(exposed), int(mitigated))


def baseline_status(metadata: dict[str, Any]) -> str:
    """Returns the status relative to the baseline, from the number of earlier scans that reported the finding."""
    if "seen_scans" not in metadata:
        return "unknown"
    return "existing" if metadata["seen_scans"] else "new"


def ground_truth_labels(finding: dict[str, Any]) -> dict[str, Any]:
    """Computes the noiseless labels of a generated finding from its category, description and metadata only.

    Returns:
        ``severity``, ``risk_score`` (int), ``base_severity_score``, ``risk_subscores``, ``probability_actionable``,
        ``tags``, ``baseline_status`` and, for severity medium and higher, ``rationale``.

    Raises:
        ValueError: the finding was not written by this generator.
    """
    sentence, features = extract_features(finding)
    labels = labels_of(features)
    names = ("impact", "exposure", "anomaly", "confidence")
    values = {
        "severity": labels.severity,
        "risk_score": labels.score,
        "base_severity_score": base_score(features),
        "risk_subscores": {name: value / 100 for name, value in zip(names, labels.subscores, strict=True)},
        "probability_actionable": labels.probability / 100,
        "tags": list(labels.tags),
        "baseline_status": baseline_status(finding["metadata"]),
    }
    if labels.score >= RATIONALE_FROM:
        values["rationale"] = rationale_of(sentence, features)
    return values


class DerivedCorrelation(NamedTuple):
    """A correlation that is derived from findings.

    Attributes:
        type: one of the correlation types of the archive.
        shared: the key that its findings share ("pid" or "path"), and the value.
        members: indices of its findings.
        score: noiseless risk score.
        delta: difference of ``score`` and the highest noiseless risk score of its findings.
        severity: severity of ``score``.
        strength: strength from 0 to 1.
        subscores: highest noiseless subscores of its findings, in hundredths.
    """

    type: str
    shared: tuple[str, str]
    members: list[int]
    score: int
    delta: int
    severity: str
    strength: float
    subscores: list[int]


def correlate(findings: Sequence[dict[str, Any]]) -> list[DerivedCorrelation]:
    """Derives the correlations of the findings of one shard.

    Findings that share ``metadata.pid`` or ``metadata.path`` form a group. A group with some evidence and a known
    combination of categories is a correlation (:func:`correlation_type`). Its risk score is one severity step above the
    highest score of its findings. Its strength is 0.5 plus 0.07 per step of evidence in the group, at most 0.99.

    Args:
        findings: generated findings; only category, description and metadata are read.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, finding in enumerate(findings):
        metadata = finding["metadata"]
        for key in ("pid", "path"):
            if key in metadata:
                groups[key, str(metadata[key])].append(index)
    derived = (_derive_correlation(findings, shared, members) for shared, members in groups.items() if len(members) > 1)
    return [correlation for correlation in derived if correlation]


def _derive_correlation(
    findings: Sequence[dict[str, Any]], shared: tuple[str, str], members: list[int]
) -> DerivedCorrelation | None:
    members = members[:MAX_CORRELATION_MEMBERS]
    features = [extract_features(findings[index])[1] for index in members]
    evidence = [(findings[index]["category"], g.evidence) for index, g in zip(members, features, strict=True)]
    kind = correlation_type(shared[0], evidence)
    if kind is None:
        return None
    labels = [labels_of(g) for g in features]
    worst = max(label.score for label in labels)
    score = min(worst + SEVERITY_STEP, 99)
    strength = min(50 + 7 * sum(step for _, step in evidence), 99) / 100
    subscores = [max(column) for column in zip(*(label.subscores for label in labels), strict=True)]
    return DerivedCorrelation(kind, shared, members, score, score - worst, severity_of(score), strength, subscores)


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
    """Returns the correlation type of a group that shares a key, or None if the group is not a correlation.

    Args:
        key: ``pid`` or ``path``.
        members: category and steps of evidence of each finding.

    Returns:
        For a process and its traffic (network, dns): ``malware_c2`` if the traffic is known-bad and the process is
        tampered or known-bad; ``unusual_port_usage`` if only a port is unusual and the process is expected; else
        ``process_network_suspicious``. For other combinations, the type in ``_TYPES``.
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
