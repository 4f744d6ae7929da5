"""Draws what the findings of one shard are, before any text is written.

A severity is drawn by its natural share, then, by weight, one of the combinations of grounds that lead to it
(:mod:`datamodules.synthetic.labeling_rules`). So the answer follows from the grounds, and the shares hold to one
finding.

All numbers come from the raw 64-bit stream of PCG64, which NumPy keeps stable across versions (NEP 19), seeded by
(generator version, seed, shard): a shard's content depends on no other shard.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.records import CATEGORIES, SEVERITIES
from datamodules.synthetic.labeling_rules import Grounds, targets_of

Ints = NDArray[np.int64]

CATEGORY_SHARES = (0.25, 0.18, 0.12, 0.10, 0.06, 0.07, 0.08, 0.05, 0.05, 0.04)  #: in the order of CATEGORIES
SEVERITY_SHARES = (0.50, 0.15, 0.18, 0.12, 0.05)  #: info .. critical
EVIDENCE_WEIGHTS = (0.40, 0.24, 0.20, 0.16)  #: of the steps, before the severity is given
GROUND_WEIGHT = 0.04  #: of privileged, exposed and mitigated each, before the severity is given
HOSTILE_SHARE = 0.03  #: of command lines that hold text aimed at a language model (1 % of all findings)
RISK_NOISE = 3  #: points, uniform, on risk_score; the severity's band is never left
SCORE_NOISE = 2  #: hundredths, uniform, on each subscore and on probability_actionable
_FIRST_PID, _PID_STRIDE = 300, 13

GROUNDS = [Grounds(e, w, p, x, m) for e in range(4) for w in range(3) for p in (0, 1) for x in (0, 1) for m in (0, 1)]
TARGETS = [targets_of(grounds) for grounds in GROUNDS]


def _weight(grounds: Grounds) -> float:
    marks = (grounds.privileged, grounds.exposed, grounds.mitigated)
    return EVIDENCE_WEIGHTS[grounds.evidence] * float(
        np.prod([GROUND_WEIGHT if m else 1 - GROUND_WEIGHT for m in marks])
    )


_WEIGHTS = np.array([_weight(grounds) for grounds in GROUNDS])
_EVIDENCE = np.array([grounds.evidence for grounds in GROUNDS])
_EXPOSED = np.array([grounds.exposed for grounds in GROUNDS])
_NOISELESS = np.array([(t.score, *t.subscores, t.probability) for t in TARGETS])  # (96, 6)
_NOISE = np.array([RISK_NOISE] + [SCORE_NOISE] * 5)


class Row(NamedTuple):
    """What is drawn for one finding.

    Attributes:
        number: position in the shard.
        category: index into CATEGORIES.
        grounds: index into GROUNDS.
        pid: distinct in the shard but for linked findings.
        place: 31-bit number that stands for a path; equal in linked findings.
        seen: earlier scans that saw it, -1 where unknown.
        hostile: whether a command line holds text aimed at a language model.
        a: free 31-bit number, as ``b`` and ``c``: each function takes what names and numbers it needs from them.
        b: as ``a``.
        c: as ``a``.
        risk: risk score with noise.
        hundredths: impact, exposure, anomaly, confidence and probability with noise.
    """

    number: int
    category: int
    grounds: int
    pid: int
    place: int
    seen: int
    hostile: bool
    a: int
    b: int
    c: int
    risk: int
    hundredths: list[int]


class Stream:
    """Uniform numbers from raw PCG64 output, seeded by a key of non-negative integers."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def integers(self, *shape: int) -> Ints:
        """31-bit integers."""
        raw = np.asarray(self._bits.random_raw(int(np.prod(shape))))
        return (raw >> np.uint64(33)).astype(np.int64).reshape(shape)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Numbers in [0, 1) on a grid of 2^-31."""
        return self.integers(n) / 2**31

    def permutation(self, n: int) -> Ints:
        """The numbers below n in random order."""
        return np.argsort(self.integers(n), kind="stable")

    def shares(self, shares: tuple[float, ...], n: int) -> Ints:
        """Systematic sample: each index as often as its share says, give or take one, in random order."""
        points = (np.arange(n) + self.uniform(1)) / n
        drawn = np.searchsorted(np.cumsum(shares)[:-1], points, side="right")
        return drawn[self.permutation(n)]


def draw_rows(stream: Stream, n: int) -> list[Row]:
    """Draws n findings' grounds, links, free numbers and noise."""
    category = stream.shares(CATEGORY_SHARES, n)
    grounds = _draw_grounds(stream, stream.shares(SEVERITY_SHARES, n))
    pid = _FIRST_PID + stream.permutation(n) * _PID_STRIDE + stream.integers(n) % _PID_STRIDE
    place = stream.integers(n)
    _link(stream, category, grounds, {"pid": pid, "path": place})
    seen = _draw_seen(stream, n)
    hostile = stream.uniform(n) < HOSTILE_SHARE
    free = stream.integers(3, n)
    noise = stream.integers(n, len(_NOISE)) % (2 * _NOISE + 1) - _NOISE
    answers = np.clip(_NOISELESS[grounds] + noise, 0, 100)
    columns = (category, grounds, pid, place, seen, hostile, *free, answers[:, 0], answers[:, 1:])
    return [Row(i, *values) for i, values in enumerate(zip(*(c.tolist() for c in columns), strict=True))]


def _draw_grounds(stream: Stream, level: Ints) -> Ints:
    """For each severity level an index into GROUNDS that leads to it, by weight."""
    grounds = np.empty_like(level)
    uniform = stream.uniform(len(level))
    for value, severity in enumerate(SEVERITIES):
        options = np.array([i for i, target in enumerate(TARGETS) if target.severity == severity])
        edges = np.cumsum(_WEIGHTS[options])
        rows = level == value
        grounds[rows] = options[np.searchsorted(edges[:-1] / edges[-1], uniform[rows], side="right")]
    return grounds


def _draw_seen(stream: Stream, n: int) -> Ints:
    """Earlier scans that saw the finding: 0 for a quarter, unknown (-1) for a fifth, else 1..60."""
    uniform, count = stream.uniform(n), 1 + stream.integers(n) % 60
    return np.where(uniform < 0.25, 0, np.where(uniform < 0.45, -1, count))


class Link(NamedTuple):
    """Findings of two categories that come to share a key.

    Attributes:
        key: "pid" or "path".
        first: category of one finding.
        second: category of the other.
        share: of the rarer category's candidates.
        suspicious: whether the one and the other show evidence.
        size: findings in a group, where both categories are the same.
    """

    key: str
    first: str
    second: str
    share: float
    suspicious: tuple[bool, bool] = (True, True)
    size: int = 2


LINKS = (
    Link("pid", "processes", "network", 0.4),
    Link("pid", "processes", "network", 0.4, (False, True)),
    Link("pid", "processes", "network", 0.1, (False, False)),  # a service and its port, as expected: no correlation
    Link("pid", "processes", "dns", 0.4),
    Link("pid", "processes", "kernel_params", 0.2),
    Link("pid", "modules", "kernel_params", 0.2),
    Link("path", "kernel_params", "kernel_params", 0.4, size=3),
    Link("path", "ioc", "world_writable", 0.4),
    Link("path", "ioc", "suid", 0.3),
    Link("path", "suid", "world_writable", 0.4),
    Link("path", "suid", "mac", 0.4),
    Link("path", "suid", "world_writable", 0.1, (False, False)),
)


def _link(stream: Stream, category: Ints, grounds: Ints, keys: dict[str, Ints]) -> None:
    """Lets findings share a PID or a place (in place). A finding is linked at most once by each key."""
    evident = _EVIDENCE[grounds] > 0
    # A file's path shows whether it is exposed, so only equals can share one; no daemon lies in an open directory.
    opens = np.where(category == CATEGORIES.index("mac"), 0, _EXPOSED[grounds])
    free = {key: np.ones(len(category), bool) for key in keys}
    for link in LINKS:
        order = stream.permutation(len(category))
        sides = [
            order[(free[link.key] & (category == CATEGORIES.index(name)) & (evident == suspicious))[order]]
            for name, suspicious in zip((link.first, link.second), link.suspicious, strict=True)
        ]
        by_place = link.key == "path" and link.first != link.second
        for value in (0, 1) if by_place else (None,):
            parts = [side if value is None else side[opens[side] == value] for side in sides]
            groups = _groups(link, *parts)
            keys[link.key][groups[:, 1:]] = keys[link.key][groups[:, :1]]
            free[link.key][groups] = False


def _groups(link: Link, first: Ints, second: Ints) -> Ints:
    """Index groups (groups, size) of a link among its candidates."""
    if link.first == link.second:
        count = int(len(first) * link.share) // link.size
        return first[: count * link.size].reshape(count, link.size)
    count = int(min(len(first), len(second)) * link.share)
    return np.stack([first[:count], second[:count]], axis=1)
