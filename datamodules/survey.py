"""A survey of the data: one pass that counts what a run would be given, and packs the first epoch in every mode.

The rows of the configured packing are those of epoch 0 as :class:`datamodules.findings.FindingsDataModule` makes them,
with its mixture and balance; only batches are not laid out. Memory is bounded: lengths are histograms, rows live for a
block, distinct examples are 64-bit keys in one set.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np

from datamodules.batch import IGNORE_INDEX
from datamodules.findings import FIRST_BLOCK, FindingsDataModule
from datamodules.near_duplicates import NearDuplicates
from datamodules.packing import Packing, Row, length, to_batch
from datamodules.sources import parse
from datamodules.stream.blocks import BlockStart, Recipe, blocks
from datamodules.stream.columns import Columns
from datamodules.stream.conflicts import merge_conflicts
from datamodules.stream.dedup import Deduplicator, KeySet
from datamodules.stream.ledger import Ledger
from datamodules.stream.order import Place, epoch_order, walk
from datamodules.stream.prepare import PreparedDocument
from datamodules.stream.splits import SPLITS, Split, input_key, split_document
from datamodules.tasks.prompts import finding_content

if TYPE_CHECKING:
    from collections.abc import Callable

    from datamodules.records import Document
    from datamodules.sources import RawDocument
    from datamodules.tokenization import Example

T = TypeVar("T")

MODES: tuple[Packing, ...] = get_args(Packing)
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

    row_tokens: int
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
        tokens = max(self.rows * self.row_tokens, 1)
        return {
            "rows": self.rows, "tokens": self.rows * self.row_tokens, "efficiency": self.used / tokens,
            "padding": 1 - self.used / tokens if self.rows else 0.0, "supervised": self.supervised / tokens,
            "prefix_saved": self.apart - self.used, "prefix_saved_share": 1 - self.used / max(self.apart, 1),
        }  # fmt: skip


class _Foreseen(Deduplicator):
    """Repeats what the survey's own set of keys said of the same examples: three packings need no sets of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.said: deque[tuple[np.ndarray, np.ndarray]] = deque()

    def add(self, keys: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes as many answers as there are keys; blocks end where documents end, so the pieces fit."""
        pieces = [(np.zeros(0, bool), np.zeros(0, bool))]
        count = 0
        while count < len(keys):
            pieces.append(self.said.popleft())
            count += len(pieces[-1][0])
        duplicate, conflict = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return duplicate, conflict


@dataclass
class Survey:
    """What :func:`survey` found. Counters by task hold distinct examples of all splits that fit a row.

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


def survey(
    data: FindingsDataModule,
    *,
    devices: int = 1,
    limit: int | None = None,
    near_duplicates: int = 0,
    progress: Callable[[Survey, Place], None] = lambda _, __: None,
) -> Survey:
    """Reads the sources once, in the order of epoch 0.

    Args:
        data: configured; :meth:`FindingsDataModule.setup` is called.
        devices: how many the run is for; rows come in multiples of ``batch_rows`` times it.
        limit: stops behind the document in which so many findings are reached.
        near_duplicates: distinct findings to compare with each other.
        progress: called behind each document.

    Raises:
        UserError: the sources can't be read, or an option can't be served.
    """
    data.setup("inspect")
    found = Survey(near=NearDuplicates(near_duplicates) if near_duplicates else None)
    foreseen = {mode: _Foreseen() for mode in MODES}
    reader = _Reader(data, found, list(foreseen.values()))
    copies = _fan_out(reader.training_documents(limit, progress), len(MODES))  # read in turn, block by block
    made = [
        blocks(documents, _recipe(data, mode), BlockStart(seen=foreseen[mode]), Ledger(1.0), quantum=quantum)
        for quantum in (data.batch_rows * devices,)
        for mode, documents in zip(MODES, copies, strict=True)
    ]
    found.packed = {mode: Packed(data.row_tokens) for mode in MODES}
    for parallel in zip(*made, strict=True):
        for mode, block in zip(MODES, parallel, strict=True):
            rows = block.rows[: block.emit]
            found.packed[mode].add(rows)
            if mode == data.packing:
                found.counts["unsupervised"] += sum(_unsupervised(row, data.row_tokens) for row in rows)
                if found.sample is None and block.rows:
                    found.sample = block.rows[0].examples[0]
    return found


def _fan_out(items: Iterator[T], count: int) -> list[Iterator[T]]:
    """Gives every item to each of several readers; ``itertools.tee`` would hold 57 documents longer than need be."""
    waiting: list[deque[T]] = [deque() for _ in range(count)]

    def read(own: deque[T]) -> Iterator[T]:
        while True:
            if not own:
                try:
                    item = next(items)
                except StopIteration:
                    return
                for queue in waiting:
                    queue.append(item)
                del item
            yield own.popleft()

    return [read(own) for own in waiting]


def _recipe(data: FindingsDataModule, mode: Packing) -> Recipe:
    return Recipe(
        tasks=data.shares,
        row_tokens=data.row_tokens,
        packing=mode,
        block_examples=data.block_findings,
        first_block=min(FIRST_BLOCK, data.block_findings),
        seed=data.seed,
        balance=data.balance,
        balance_by=data.balance_by,
        keep_conflicts=data.conflicts == "keep",
    )


def _unsupervised(row: Row, row_tokens: int) -> int:
    """Examples of a row, laid out as for training, that carry no label."""
    batch = to_batch([row], row_tokens)
    labelled = batch.segment_ids_BT[batch.labels_BT != IGNORE_INDEX]
    return len(row.examples) - int(labelled[labelled > 0].unique().numel())


class _Reader:
    """Documents on their way to the packer: counts them, and notes which of their examples are new."""

    def __init__(self, data: FindingsDataModule, found: Survey, listeners: list[_Foreseen]) -> None:
        self.data, self.found, self.listeners = data, found, listeners
        self.preparer = data._preparer
        self.seen = {split: Deduplicator() for split in SPLITS}
        self.inputs = KeySet()

    def training_documents(
        self, limit: int | None, progress: Callable[[Survey, Place], None]
    ) -> Iterator[PreparedDocument]:
        """Reads everything, and yields what training uses of it."""
        sources = self.preparer.sources
        for place, _, raw in walk(sources, epoch_order(sources, epoch=0, seed=self.data.seed)):
            if limit is not None and self.found.counts["findings"] >= limit:
                self.found.complete = False
                return
            assert raw is not None  # no cache was asked
            yield PreparedDocument(place, self._read(raw))
            progress(self.found, place)

    def _read(self, raw: RawDocument) -> Columns:
        """Counts a document; returns its training examples."""
        parsed, counts = parse(raw), self.found.counts
        counts.update(
            documents=int(parsed.records > 0),  # a generation report is none
            records=parsed.records,
            findings=len(parsed.document.findings),
            correlations=len(parsed.document.correlations),
        )
        self.found.repairs.update(parsed.repairs)
        self.found.quarantine.update(lost.reason for lost in parsed.quarantined)
        data = self.data
        parts = split_document(parsed.document, val=data.val, test=data.test, seed=data.seed)
        columns = {split: self._encode(part) for split, part in parts.items()}
        for split, part in parts.items():
            self.found.splits[split].update(findings=len(part.findings), correlations=len(part.correlations))
            self._count(split, columns[split])
            self._compare(split, part)
        training = columns["train"]
        # where nothing fits, a run would stop with an error; the doctor goes on, and warns
        return training if (training.lengths <= data.row_tokens).any() else Columns.of([])

    def _encode(self, part: Document) -> Columns:
        if self.data.conflicts == "merge":
            part, merged = merge_conflicts(part)
            self.found.counts["merged"] += merged
        examples: list[Example] = []
        for name, task in self.data.tasks.items():
            if pairs := list(task.pairs(part)):
                examples += self.data.chat.encode(task, pairs)
            skipped: Counter[str] = getattr(task, "skipped", None) or Counter()
            self.found.skipped.update({f"{name}: {reason}": n for reason, n in skipped.items()})
            skipped.clear()
        return Columns.of(examples)

    def _count(self, split: Split, columns: Columns) -> None:
        found, fits = self.found, columns.lengths <= self.data.row_tokens
        tasks = columns.texts[0]
        found.overflow.update(_named(columns, tasks[~fits]))
        indices = np.flatnonzero(fits)
        duplicate, conflict = self.seen[split].add(columns.keys[indices], columns.inputs[indices])
        if split == "train" and len(indices):
            for listener in self.listeners:
                listener.said.append((duplicate, conflict))
        found.counts.update(duplicates=int(duplicate.sum()), conflicts=int(conflict.sum()))
        kept = indices[~(duplicate | (conflict & (self.data.conflicts != "keep")))]
        found.splits[split]["examples"] += len(kept)
        found.counts["unsupervised"] += int((columns.completions[kept] == 0).sum())
        for code in np.unique(tasks[kept]):
            name, of_task = columns.names[code], kept[tasks[kept] == code]
            found.examples[name] += len(of_task)
            found.trained[name] += len(of_task) if split == "train" else 0
            found.severities[name].update(_named(columns, columns.texts[1, of_task]))
            found.categories[name].update(_named(columns, columns.texts[2, of_task]))
            prompts, completions = columns.prompts[of_task], columns.completions[of_task]
            for part, values in (("prompt", prompts), ("completion", completions), ("total", prompts + completions)):
                found.lengths[name][part].add(values)

    def _compare(self, split: Split, part: Document) -> None:
        near = self.found.near
        if near is None or near.full or not part.findings:
            return
        new = self.inputs.add(np.array([input_key(finding) for finding in part.findings], np.uint64))
        for index in np.flatnonzero(new):
            near.add(finding_content(part.findings[index]), split)


def _named(columns: Columns, codes: np.ndarray) -> dict[str, int]:
    """Counts by name."""
    values, counts = np.unique(codes, return_counts=True)
    return {columns.names[value]: int(count) for value, count in zip(values, counts, strict=True)}


def report_counts(found: Survey, data: FindingsDataModule) -> dict[str, Any]:
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
            "mode": data.packing, "row_tokens": data.row_tokens,
            "efficiency": configured.summary()["efficiency"],
            "modes": {mode: packed.summary() for mode, packed in found.packed.items()},
        },
    }  # fmt: skip
