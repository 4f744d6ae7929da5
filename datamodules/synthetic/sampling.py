"""Samples the features, links and noise of the findings of one shard, before any text is written.

The severity is sampled first, by its natural share. Then one of the combinations of features with that severity is
sampled by weight (:mod:`datamodules.synthetic.labeling_rules`). The labels are therefore a function of the features,
and the number of findings of each severity is exact to one finding.

All numbers are from the raw 64-bit stream of PCG64, which NumPy keeps stable across versions (NEP 19), seeded by
(generator version, seed, shard). The content of a shard does not depend on other shards.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.records import CATEGORIES, SEVERITIES
from datamodules.synthetic.labeling_rules import Features, labels_of

Ints = NDArray[np.int64]

CATEGORY_SHARES = (0.25, 0.18, 0.12, 0.10, 0.06, 0.07, 0.08, 0.05, 0.05, 0.04)  #: in the order of CATEGORIES
SEVERITY_SHARES = (0.50, 0.15, 0.18, 0.12, 0.05)  #: info .. critical
EVIDENCE_WEIGHTS = (0.40, 0.24, 0.20, 0.16)  #: weights of the steps of evidence, before conditioning on the severity
FEATURE_WEIGHT = 0.04  #: probability of privileged, exposed and mitigated each, before conditioning on the severity
PROMPT_INJECTION_SHARE = 0.03  #: share of command lines with text for a language model (1 % of all findings)
RISK_NOISE = 3  #: points of uniform noise on risk_score; the score stays in the range of its severity
SCORE_NOISE = 2  #: hundredths of uniform noise on each subscore and on probability_actionable
_FIRST_PID, _PID_STRIDE = 300, 13

#: all combinations of features, and their labels
FEATURES = [Features(e, w, p, x, m) for e in range(4) for w in range(3) for p in (0, 1) for x in (0, 1) for m in (0, 1)]
LABELS = [labels_of(features) for features in FEATURES]


def _weight(features: Features) -> float:
    flags = (features.privileged, features.exposed, features.mitigated)
    return EVIDENCE_WEIGHTS[features.evidence] * float(
        np.prod([FEATURE_WEIGHT if m else 1 - FEATURE_WEIGHT for m in flags])
    )


_WEIGHTS = np.array([_weight(features) for features in FEATURES])
_EVIDENCE = np.array([features.evidence for features in FEATURES])
_EXPOSED = np.array([features.exposed for features in FEATURES])
_NOISELESS = np.array([(labels.score, *labels.subscores, labels.probability) for labels in LABELS])  # (96, 6)
_NOISE = np.array([RISK_NOISE] + [SCORE_NOISE] * 5)


class SampledFinding(NamedTuple):
    """The sampled values of one finding.

    Attributes:
        number: position in the shard.
        category: index into CATEGORIES.
        features: index into FEATURES.
        pid: process id; unique in the shard except for linked findings.
        path_number: 31-bit number that determines a path; equal in linked findings.
        seen_scans: number of earlier scans that reported the finding, -1 if unknown.
        prompt_injection: whether a command line contains text that addresses a language model.
        a: independent 31-bit number from which names and numbers are chosen, like ``b`` and ``c``.
        b: see ``a``.
        c: see ``a``.
        risk: risk score with noise.
        hundredths: impact, exposure, anomaly, confidence and probability with noise, in hundredths.
    """

    number: int
    category: int
    features: int
    pid: int
    path_number: int
    seen_scans: int
    prompt_injection: bool
    a: int
    b: int
    c: int
    risk: int
    hundredths: list[int]


class RandomStream:
    """Uniform numbers from raw PCG64 output, seeded by a key of non-negative integers."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def integers(self, *shape: int) -> Ints:
        """Returns uniform 31-bit integers of a shape."""
        raw = np.asarray(self._bits.random_raw(int(np.prod(shape))))
        return (raw >> np.uint64(33)).astype(np.int64).reshape(shape)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Returns n uniform numbers in [0, 1), multiples of 2^-31."""
        return self.integers(n) / 2**31

    def permutation(self, n: int) -> Ints:
        """Returns the numbers 0 to n - 1 in random order."""
        return np.argsort(self.integers(n), kind="stable")

    def systematic(self, shares: tuple[float, ...], n: int) -> Ints:
        """Returns n indices in random order, each as often as its share requires, plus or minus one.

        Systematic sampling: https://en.wikipedia.org/wiki/Systematic_sampling.
        """
        points = (np.arange(n) + self.uniform(1)) / n
        drawn = np.searchsorted(np.cumsum(shares)[:-1], points, side="right")
        return drawn[self.permutation(n)]


def sample_findings(stream: RandomStream, n: int) -> list[SampledFinding]:
    """Samples the values of the n findings of a shard."""
    category = stream.systematic(CATEGORY_SHARES, n)
    features = _sample_features(stream, stream.systematic(SEVERITY_SHARES, n))
    pid = _FIRST_PID + stream.permutation(n) * _PID_STRIDE + stream.integers(n) % _PID_STRIDE
    path_number = stream.integers(n)
    _link_findings(stream, category, features, {"pid": pid, "path": path_number})
    seen_scans = _sample_seen_scans(stream, n)
    prompt_injection = stream.uniform(n) < PROMPT_INJECTION_SHARE
    free = stream.integers(3, n)
    noise = stream.integers(n, len(_NOISE)) % (2 * _NOISE + 1) - _NOISE
    answers = np.clip(_NOISELESS[features] + noise, 0, 100)
    columns = (category, features, pid, path_number, seen_scans, prompt_injection, *free, answers[:, 0], answers[:, 1:])
    return [SampledFinding(i, *values) for i, values in enumerate(zip(*(c.tolist() for c in columns), strict=True))]


def _sample_features(stream: RandomStream, level: Ints) -> Ints:
    """Returns an index into FEATURES for each severity level, sampled by weight among those with that severity."""
    features = np.empty_like(level)
    uniform = stream.uniform(len(level))
    for value, severity in enumerate(SEVERITIES):
        options = np.array([i for i, labels in enumerate(LABELS) if labels.severity == severity])
        edges = np.cumsum(_WEIGHTS[options])
        rows = level == value
        features[rows] = options[np.searchsorted(edges[:-1] / edges[-1], uniform[rows], side="right")]
    return features


def _sample_seen_scans(stream: RandomStream, n: int) -> Ints:
    """Returns the numbers of earlier scans: 0 for a quarter of the findings, unknown (-1) for a fifth, else 1 to 60."""
    uniform, count = stream.uniform(n), 1 + stream.integers(n) % 60
    return np.where(uniform < 0.25, 0, np.where(uniform < 0.45, -1, count))


class SharedKeyRule(NamedTuple):
    """A rule by which findings of two categories get the same key.

    Attributes:
        key: "pid" or "path".
        first: category of the first finding.
        second: category of the second finding.
        share: share of the candidates of the rarer category that are linked.
        suspicious: whether the first and the second finding must have evidence beyond "expected".
        size: number of findings in a group if both categories are the same.
    """

    key: str
    first: str
    second: str
    share: float
    suspicious: tuple[bool, bool] = (True, True)
    size: int = 2


SHARED_KEY_RULES = (
    SharedKeyRule("pid", "processes", "network", 0.4),
    SharedKeyRule("pid", "processes", "network", 0.4, (False, True)),
    SharedKeyRule("pid", "processes", "network", 0.1, (False, False)),  # expected: not a correlation
    SharedKeyRule("pid", "processes", "dns", 0.4),
    SharedKeyRule("pid", "processes", "kernel_params", 0.2),
    SharedKeyRule("pid", "modules", "kernel_params", 0.2),
    SharedKeyRule("path", "kernel_params", "kernel_params", 0.4, size=3),
    SharedKeyRule("path", "ioc", "world_writable", 0.4),
    SharedKeyRule("path", "ioc", "suid", 0.3),
    SharedKeyRule("path", "suid", "world_writable", 0.4),
    SharedKeyRule("path", "suid", "mac", 0.4),
    SharedKeyRule("path", "suid", "world_writable", 0.1, (False, False)),
)


def _link_findings(stream: RandomStream, category: Ints, features: Ints, keys: dict[str, Ints]) -> None:
    """Gives groups of findings the same PID or path number, in place. Each key links a finding at most once."""
    has_evidence = _EVIDENCE[features] > 0
    # A path shows whether the file is exposed, so that only findings with the same value can share one. The program of
    # a daemon (category mac) is never in an open directory.
    path_is_exposed = np.where(category == CATEGORIES.index("mac"), 0, _EXPOSED[features])
    unlinked = {key: np.ones(len(category), bool) for key in keys}
    for rule in SHARED_KEY_RULES:
        order = stream.permutation(len(category))
        sides = [
            order[(unlinked[rule.key] & (category == CATEGORIES.index(name)) & (has_evidence == suspicious))[order]]
            for name, suspicious in zip((rule.first, rule.second), rule.suspicious, strict=True)
        ]
        by_place = rule.key == "path" and rule.first != rule.second
        for value in (0, 1) if by_place else (None,):
            parts = [side if value is None else side[path_is_exposed[side] == value] for side in sides]
            groups = _groups(rule, *parts)
            keys[rule.key][groups[:, 1:]] = keys[rule.key][groups[:, :1]]
            unlinked[rule.key][groups] = False


def _groups(rule: SharedKeyRule, first: Ints, second: Ints) -> Ints:
    """Returns the linked groups among the candidates of a rule, as indices of shape (groups, size)."""
    if rule.first == rule.second:
        count = int(len(first) * rule.share) // rule.size
        return first[: count * rule.size].reshape(count, rule.size)
    count = int(min(len(first), len(second)) * rule.share)
    return np.stack([first[:count], second[:count]], axis=1)
