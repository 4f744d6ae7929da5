"""A survey of the data: one pass that counts what a run would be given, and packs the first epoch in every mode.

The rows of the configured packing are those of epoch 0 as :class:`datamodules.findings.FindingsDataModule` makes them,
with its mixture and balance; only batches are not laid out. Memory is bounded: lengths are histograms, rows live for a
block, distinct examples are 64-bit keys in one set.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar, get_args

import numpy as np

from datamodules.batch import IGNORE_INDEX
from datamodules.packing import Packing, Row, to_batch
from datamodules.sources import parse
from datamodules.statistics.near_duplicates import NearDuplicates
from datamodules.statistics.summary import DatasetSummary, Packed
from datamodules.stream.blocks import BlockStart, blocks
from datamodules.stream.conflicts import merge_conflicts
from datamodules.stream.counters import PipelineCounters
from datamodules.stream.dedup import Deduplicator, HashSet
from datamodules.stream.epoch_order import Place, epoch_order, walk
from datamodules.stream.example_columns import Columns
from datamodules.stream.preprocessing import PreparedDocument
from datamodules.stream.splits import SPLITS, Split, input_key, split_document
from datamodules.tasks.base import finding_content

if TYPE_CHECKING:
    from collections.abc import Callable

    from datamodules.findings import FindingsDataModule
    from datamodules.records import Document
    from datamodules.sources import RawDocument
    from datamodules.tokenization.chat_format import Example

T = TypeVar("T")

MODES: tuple[Packing, ...] = get_args(Packing)


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


def scan_dataset(
    data: FindingsDataModule,
    *,
    devices: int = 1,
    limit: int | None = None,
    near_duplicates: int = 0,
    progress: Callable[[DatasetSummary, Place], None] = lambda _, __: None,
) -> DatasetSummary:
    """Reads the sources once, in the order of epoch 0.

    Args:
        data: configured; :meth:`FindingsDataModule.setup` is called.
        devices: how many the run is for; rows come in multiples of ``batch_size`` times it.
        limit: stops behind the document in which so many findings are reached.
        near_duplicates: distinct findings to compare with each other.
        progress: called behind each document.

    Raises:
        UserError: the sources can't be read, or an option can't be served.
    """
    data.setup("inspect")
    found = DatasetSummary(near=NearDuplicates(near_duplicates) if near_duplicates else None)
    foreseen = {mode: _Foreseen() for mode in MODES}
    reader = _Reader(data, found, list(foreseen.values()))
    copies = _fan_out(reader.training_documents(limit, progress), len(MODES))  # read in turn, block by block
    made = [
        blocks(
            documents,
            data.recipe(mode),
            BlockStart(seen=foreseen[mode]),
            PipelineCounters(1.0),
            rows_multiple=rows_multiple,
        )
        for rows_multiple in (data.batch_size * devices,)
        for mode, documents in zip(MODES, copies, strict=True)
    ]
    found.packed = {mode: Packed(data.sequence_length) for mode in MODES}
    for parallel in zip(*made, strict=True):
        for mode, block in zip(MODES, parallel, strict=True):
            rows = block.rows[: block.emit]
            found.packed[mode].add(rows)
            if mode == data.packing:
                found.counts["unsupervised"] += sum(_unsupervised(row, data.sequence_length) for row in rows)
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


def _unsupervised(row: Row, sequence_length: int) -> int:
    """Examples of a row, laid out as for training, that carry no label."""
    batch = to_batch([row], sequence_length)
    labelled = batch.segment_ids_BT[batch.labels_BT != IGNORE_INDEX]
    return len(row.examples) - int(labelled[labelled > 0].unique().numel())


class _Reader:
    """Documents on their way to the packer: counts them, and notes which of their examples are new."""

    def __init__(self, data: FindingsDataModule, found: DatasetSummary, listeners: list[_Foreseen]) -> None:
        self.data, self.found, self.listeners = data, found, listeners
        self.processor = data.document_processor
        self.seen = {split: Deduplicator() for split in SPLITS}
        self.inputs = HashSet()

    def training_documents(
        self, limit: int | None, progress: Callable[[DatasetSummary, Place], None]
    ) -> Iterator[PreparedDocument]:
        """Reads everything, and yields what training uses of it."""
        sources = self.processor.sources
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
        parts = split_document(
            parsed.document, val_fraction=data.val_fraction, test_fraction=data.test_fraction, seed=data.seed
        )
        columns = {split: self._encode(part) for split, part in parts.items()}
        for split, part in parts.items():
            self.found.splits[split].update(findings=len(part.findings), correlations=len(part.correlations))
            self._count(split, columns[split])
            self._compare(split, part)
        training = columns["train"]
        # where nothing fits, a run would stop with an error; the doctor goes on, and warns
        return training if (training.lengths <= data.sequence_length).any() else Columns.of([])

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
        found, fits = self.found, columns.lengths <= self.data.sequence_length
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
