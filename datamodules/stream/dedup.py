"""Duplicates (equal input and answer) and conflicts (equal input, different answers).

:class:`HashSet` stores 64-bit keys in flat memory. Its layout is that of Python's dict: the keys in the order of
arrival, and a sparse table of 4-byte indices into them with at least 1.5 slots per key (linear probing). 2.5 million
keys take 40 MB; a Python set takes 230 MB. The first n keys are always the set as it was after n arrivals; a
checkpoint stores them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import median

import numpy as np

from datamodules.records import Document, Finding
from datamodules.stream.splits import input_key

_FIBONACCI = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / phi (Knuth): spreads keys that are not digests, such as 1, 2, 3
_FULL = 2 / 3  #: share of used slots at which the table doubles: 2.7 probes on average for an absent key


class HashSet:
    """An insertion-ordered set of unsigned 64-bit keys; thousands are added at once.

    Args:
        keys: uint64, the first members, without repetition.
    """

    def __init__(self, keys: np.ndarray | None = None) -> None:
        self._count = 0
        self._keys = np.empty(0, np.uint64)
        self._allocate(10)
        if keys is not None:
            self.add(keys)

    def __len__(self) -> int:
        return self._count

    def first(self, count: int) -> np.ndarray:
        """Returns the first ``count`` keys in the order of arrival; later additions never change them."""
        return self._keys[:count]

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Adds keys.

        Args:
            keys: uint64 [N]; a key may occur more than once.

        Returns:
            bool [N], true for keys that are new: neither in the set nor earlier in ``keys``.
        """
        unique, first = np.unique(keys, return_index=True)
        new = np.zeros(len(keys), bool)
        new[first[~self._contains(unique)]] = True
        fresh = keys[new]  # in the order of arrival
        self._reserve(self._count + len(fresh))
        self._keys[self._count : self._count + len(fresh)] = fresh
        self._insert(np.arange(self._count, self._count + len(fresh)))
        self._count += len(fresh)
        return new

    @property
    def nbytes(self) -> int:
        """Size of both arrays in bytes."""
        return self._keys.nbytes + self._table.nbytes

    def _allocate(self, bits: int) -> None:
        self._bits = bits
        self._table = np.full(1 << bits, -1, np.int32)
        keys = np.empty(int(_FULL * (1 << bits)), np.uint64)
        if self._count:
            keys[: self._count] = self._keys[: self._count]
        self._keys = keys

    def _reserve(self, count: int) -> None:
        bits = self._bits
        while count > int(_FULL * (1 << bits)):
            bits += 1
        if bits > self._bits:
            self._allocate(bits)
            self._insert(np.arange(self._count))

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return ((keys * _FIBONACCI) >> np.uint64(64 - self._bits)).astype(np.int64)

    def _contains(self, keys: np.ndarray) -> np.ndarray:
        contained = np.zeros(len(keys), bool)
        pending, slots = np.arange(len(keys)), self._slots(keys)
        while len(pending):
            entries = self._table[slots]
            taken = entries >= 0
            same = taken & (self._keys[np.where(taken, entries, 0)] == keys[pending])
            contained[pending[same]] = True
            further = taken & ~same
            pending, slots = pending[further], (slots[further] + 1) & (len(self._table) - 1)
        return contained

    def _insert(self, indices: np.ndarray) -> None:
        """Enters keys that are not in the table yet. If several keys need one slot, the last one written gets it."""
        slots = self._slots(self._keys[indices])
        while len(indices):
            free = self._table[slots] < 0
            self._table[slots[free]] = indices[free]
            displaced = self._table[slots] != indices
            indices, slots = indices[displaced], (slots[displaced] + 1) & (len(self._table) - 1)


class Deduplicator:
    """Separates new examples from exact duplicates and from conflicts (the same input with another answer).

    Args:
        keys: uint64, keys of the examples (input and answer) seen before.
        inputs: uint64, input keys seen before.
    """

    def __init__(self, keys: np.ndarray | None = None, inputs: np.ndarray | None = None) -> None:
        self.keys, self.inputs = HashSet(keys), HashSet(inputs)

    def add(self, keys: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds examples in their order; the first one of each input is kept.

        Args:
            keys: uint64 [N], keys of the examples.
            inputs: uint64 [N], their input keys.

        Returns:
            Two bool arrays [N]: whether an example is an exact duplicate, and whether it is a conflict.
        """
        new = self.keys.add(keys)
        conflict = np.zeros(len(keys), bool)
        conflict[new] = ~self.inputs.add(inputs[new])
        return ~new, conflict


def merge_conflicts(document: Document) -> tuple[Document, int]:
    """Gives findings of equal input one answer: the finding nearest to the median risk, with the median of each number.

    Args:
        document: it is not changed.

    Returns:
        The document with the same number of findings (ids and order stay; new duplicates are dropped later), and the
        number of findings whose answer changed.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, finding in enumerate(document.findings):
        groups[input_key(finding)].append(index)
    findings, merged = list(document.findings), 0
    for indices in groups.values():
        answers = [findings[i] for i in indices]
        if len(answers) == 1 or all(_answer(finding) == _answer(answers[0]) for finding in answers[1:]):
            continue
        median_answer = _median_answer(answers)
        for i in indices:
            merged += _answer(findings[i]) != _answer(median_answer)
            findings[i] = replace(median_answer, id=findings[i].id, correlation_refs=findings[i].correlation_refs)
    return replace(document, findings=findings), merged


def _answer(finding: Finding) -> tuple[object, ...]:
    """Returns the fields that a model predicts: all but the input, the id and the references."""
    return (
        finding.severity, finding.risk_score, finding.base_severity_score, finding.tags, finding.risk_subscores,
        finding.probability_actionable, finding.baseline_status, finding.rationale, finding.enrichment,
    )  # fmt: skip


def _median_answer(answers: list[Finding]) -> Finding:
    """Returns the finding nearest to the median risk, with the median of each number."""
    risk = median(finding.risk_score for finding in answers)
    nearest = min(answers, key=lambda finding: abs(finding.risk_score - risk))  # the first one of several
    probabilities = [f.probability_actionable for f in answers if f.probability_actionable is not None]
    subscores = {
        name: median(finding.risk_subscores[name] for finding in answers if name in finding.risk_subscores)
        for name in nearest.risk_subscores
    }
    return replace(
        nearest,
        risk_score=risk,
        base_severity_score=median(finding.base_severity_score for finding in answers),
        risk_subscores=subscores,
        probability_actionable=median(probabilities) if probabilities else None,
    )
