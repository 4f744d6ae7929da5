"""What a survey of the data found: counters, lengths, packing; and the report of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.packing import Packing, Row, length
from datamodules.stream.splits import SPLITS, Split

if TYPE_CHECKING:
    from datamodules.findings import FindingsDataModule
    from datamodules.statistics.near_duplicates import NearDuplicates
    from datamodules.tokenization.chat_format import Example

PERCENTILES = (50, 90, 95, 99)


class Histogram:
    """Counts of small whole numbers."""

    def __init__(self) -> None:
        self.counts = np.zeros(1, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Adds numbers >= 0."""
        new = np.bincount(values)
        if len(new) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(new) - len(self.counts)))
        self.counts[: len(new)] += new

    def summary(self) -> dict[str, int | float]:
        """Mean, percentiles (the smallest value that so many do not exceed) and maximum; zeros where empty."""
        total = int(self.counts.sum())
        if not total:
            return {"mean": 0.0} | {f"p{p}": 0 for p in PERCENTILES} | {"max": 0}
        ends = np.cumsum(self.counts)
        at = np.searchsorted(ends, [np.ceil(p / 100 * total) for p in PERCENTILES])
        mean = float(np.arange(len(self.counts)) @ self.counts) / total
        summary: dict[str, int | float] = {"mean": round(mean, 1)}
        summary |= {f"p{p}": int(value) for p, value in zip(PERCENTILES, at, strict=True)}
        return summary | {"max": int(np.flatnonzero(self.counts)[-1])}


@dataclass
class Packed:
    """Sums over the rows of one packing mode.

    Attributes:
        rows: rows of the epoch, without its tail.
        used: tokens of the rows that are no padding: what is computed.
        apart: tokens that their examples have one by one.
        supervised: tokens that carry a label.
    """

    sequence_length: int
    rows: int = 0
    used: int = 0
    apart: int = 0
    supervised: int = 0
    examples: int = 0
    findings: int = 0

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows up."""
        for row in rows:
            self.rows += 1
            self.used += row.tokens
            self.examples += len(row.examples)
            for example in row.examples:
                self.apart += length(example)
                self.supervised += len(example.completion_ids)
                self.findings += example.findings

    def summary(self) -> dict[str, int | float]:
        """Counts, and shares of the rows' tokens."""
        tokens = max(self.rows * self.sequence_length, 1)
        return {
            "rows": self.rows, "tokens": self.rows * self.sequence_length, "efficiency": self.used / tokens,
            "padding": 1 - self.used / tokens if self.rows else 0.0, "supervised": self.supervised / tokens,
            "prefix_saved": self.apart - self.used, "prefix_saved_share": 1 - self.used / max(self.apart, 1),
        }  # fmt: skip


@dataclass
class DatasetSummary:
    """What ``scan_dataset`` found. Counters by task: distinct examples of all splits that fit a row.

    Attributes:
        counts: ``documents``, ``records``, ``findings``, ``correlations``, ``duplicates``, ``conflicts``, ``merged``,
            ``unsupervised``.
        repairs: repaired records by kind.
        quarantine: records that can't be used, by reason.
        skipped: records without an example, by reason.
        examples: by task.
        trained: those of them that are in train, by task.
        severities: by task, then severity.
        categories: by task, then category.
        overflow: examples that are longer than a row, by task.
        splits: by split: ``findings``, ``correlations``, ``examples``.
        lengths: by task: ``prompt``, ``completion``, ``total``.
        packed: by packing mode, over the training epoch.
        near: near duplicates of findings, where they were asked for.
        sample: a training example.
        complete: every record was read.
    """

    counts: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    quarantine: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: Counter[str] = field(default_factory=Counter)
    trained: Counter[str] = field(default_factory=Counter)
    severities: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    categories: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    overflow: Counter[str] = field(default_factory=Counter)
    splits: dict[Split, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    lengths: dict[str, dict[str, Histogram]] = field(
        default_factory=lambda: defaultdict(lambda: {part: Histogram() for part in ("prompt", "completion", "total")})
    )
    packed: dict[Packing, Packed] = field(default_factory=dict)
    near: NearDuplicates | None = None
    sample: Example | None = None
    complete: bool = True


def report_counts(found: DatasetSummary, data: FindingsDataModule) -> dict[str, Any]:
    """The survey as one JSON-ready object."""
    configured, shared = found.packed[data.packing], found.packed["shared_prefix"]
    return {
        "records": {
            "total": found.counts["records"], "documents": found.counts["documents"],
            "findings": found.counts["findings"], "correlations": found.counts["correlations"],
            "skipped": dict(found.skipped), "complete": found.complete,
        },
        "quarantined": found.quarantine.total(), "quarantine": dict(found.quarantine.most_common()),
        "repaired": found.repairs.total(), "repairs": dict(found.repairs.most_common()),
        "duplicates": found.counts["duplicates"], "conflicts": found.counts["conflicts"],
        "merged": found.counts["merged"], "near_duplicates": found.near.summary() if found.near else None,
        "examples": {task: found.examples[task] for task in data.tasks},
        "severities": {task: dict(counts.most_common()) for task, counts in found.severities.items()},
        "categories": {task: dict(counts.most_common()) for task, counts in found.categories.items()},
        "overflow": {task: found.overflow[task] for task in data.tasks},
        "unsupervised_examples": found.counts["unsupervised"],
        "splits": {
            split: {name: counts[name] for name in ("findings", "correlations", "examples")}
            for split, counts in found.splits.items()
        },
        "lengths": {
            task: {part: histogram.summary() for part, histogram in parts.items()}
            for task, parts in found.lengths.items()
        },
        "tokens": {
            "total": configured.apart, "supervised": configured.supervised,
            "prompt": configured.apart - configured.supervised, "prefix_saved": shared.apart - shared.used,
        },
        "packing": {
            "mode": data.packing, "sequence_length": data.sequence_length,
            "efficiency": configured.summary()["efficiency"],
            "modes": {mode: packed.summary() for mode, packed in found.packed.items()},
        },
    }  # fmt: skip
