"""Results of a scan of the data: counters, lengths and packing, and their report."""

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
    """Histogram of small non-negative integers."""

    def __init__(self) -> None:
        self.counts = np.zeros(1, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Adds integers >= 0."""
        new = np.bincount(values)
        if len(new) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(new) - len(self.counts)))
        self.counts[: len(new)] += new

    def summary(self) -> dict[str, int | float]:
        """Returns mean, percentiles (inverted CDF) and maximum; zeros for an empty histogram."""
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
class PackingStatistics:
    """Sums over the rows of one packing mode.

    Attributes:
        sequence_length: tokens per row.
        rows: number of rows of the epoch, without its tail.
        used_tokens: tokens of the rows without padding; they are computed.
        unpacked_tokens: total length of the examples, each with its own prefix.
        supervised: number of tokens with a label.
        examples: number of examples.
        findings: number of findings that the examples are about.
    """

    sequence_length: int
    rows: int = 0
    used_tokens: int = 0
    unpacked_tokens: int = 0
    supervised: int = 0
    examples: int = 0
    findings: int = 0

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows to the sums."""
        for row in rows:
            self.rows += 1
            self.used_tokens += row.tokens
            self.examples += len(row.examples)
            for example in row.examples:
                self.unpacked_tokens += length(example)
                self.supervised += len(example.completion_ids)
                self.findings += example.findings

    def summary(self) -> dict[str, int | float]:
        """Returns the counts, and the shares of all tokens of the rows."""
        tokens = max(self.rows * self.sequence_length, 1)
        return {
            "rows": self.rows, "tokens": self.rows * self.sequence_length, "efficiency": self.used_tokens / tokens,
            "padding": 1 - self.used_tokens / tokens if self.rows else 0.0, "supervised": self.supervised / tokens,
            "prefix_saved": self.unpacked_tokens - self.used_tokens,
            "prefix_saved_share": 1 - self.used_tokens / max(self.unpacked_tokens, 1),
        }  # fmt: skip


@dataclass
class DatasetSummary:
    """Results of ``scan_dataset``. Counters by task count distinct examples of all splits that fit a row.

    Attributes:
        counts: ``documents``, ``records``, ``findings``, ``rationales`` (findings that have one), ``correlations``,
            ``duplicates``, ``conflicts``, ``merged``, ``unsupervised``.
        repairs: repaired records by kind.
        quarantine: records that can't be used, by reason.
        skipped: records without an example, by task and reason.
        examples: by task.
        trained: the number of them in the train split, by task.
        severities: by task, then severity.
        categories: by task, then category.
        overflow: examples that are longer than a row, by task.
        splits: by split: ``findings``, ``correlations``, ``examples``.
        lengths: by task: ``prompt``, ``completion``, ``total``.
        packed: statistics of the training epoch's rows, by packing mode.
        near: near duplicates of findings, or None if they were not requested.
        sample: a training example.
        complete: whether every record was read.
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
    packed: dict[Packing, PackingStatistics] = field(default_factory=dict)
    near: NearDuplicates | None = None
    sample: Example | None = None
    complete: bool = True


def report_counts(summary: DatasetSummary, data: FindingsDataModule) -> dict[str, Any]:
    """Returns the results as one object for JSON.

    Args:
        summary: results of the scan.
        data: data module that was scanned.
    """
    configured, shared = summary.packed[data.packing], summary.packed["shared_prefix"]
    return {
        "records": {
            "total": summary.counts["records"], "documents": summary.counts["documents"],
            "findings": summary.counts["findings"], "correlations": summary.counts["correlations"],
            "rationales": summary.counts["rationales"],
            "skipped": dict(summary.skipped), "complete": summary.complete,
        },
        "quarantined": summary.quarantine.total(), "quarantine": dict(summary.quarantine.most_common()),
        "repaired": summary.repairs.total(), "repairs": dict(summary.repairs.most_common()),
        "duplicates": summary.counts["duplicates"], "conflicts": summary.counts["conflicts"],
        "merged": summary.counts["merged"], "near_duplicates": summary.near.summary() if summary.near else None,
        "examples": {task: summary.examples[task] for task in data.tasks},
        "severities": {task: dict(counts.most_common()) for task, counts in summary.severities.items()},
        "categories": {task: dict(counts.most_common()) for task, counts in summary.categories.items()},
        "overflow": {task: summary.overflow[task] for task in data.tasks},
        "unsupervised_examples": summary.counts["unsupervised"],
        "splits": {
            split: {name: counts[name] for name in ("findings", "correlations", "examples")}
            for split, counts in summary.splits.items()
        },
        "lengths": {
            task: {part: histogram.summary() for part, histogram in parts.items()}
            for task, parts in summary.lengths.items()
        },
        "tokens": {
            "total": configured.unpacked_tokens, "supervised": configured.supervised,
            "prompt": configured.unpacked_tokens - configured.supervised,
            "prefix_saved": shared.unpacked_tokens - shared.used_tokens,
        },
        "packing": {
            "mode": data.packing, "sequence_length": data.sequence_length,
            "efficiency": configured.summary()["efficiency"],
            "modes": {mode: statistics.summary() for mode, statistics in summary.packed.items()},
        },
    }  # fmt: skip
