"""Statistics of a data set: one pass that counts records and examples, and packs the first epoch in every mode.

The rows of the configured packing are those of epoch 0 of :class:`datamodules.findings.FindingsDataModule`, with its
mixture and balance, without the tensors. Memory is bounded: lengths are histograms, rows live for one block, and
distinct examples are 64-bit keys in two sets (160 MB for 2.5 million): one counts distinct examples per split, the
other selects the examples of the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, get_args

import numpy as np

from datamodules.batch import IGNORE_INDEX
from datamodules.packing import Packing, Row, to_batch
from datamodules.sources import parse
from datamodules.statistics.near_duplicates import NearDuplicates
from datamodules.statistics.summary import DatasetSummary, PackingStatistics
from datamodules.stream.blocks import block_rng, group_documents, pack_block, select_examples
from datamodules.stream.counters import PipelineCounters
from datamodules.stream.dedup import Deduplicator, HashSet, merge_conflicts
from datamodules.stream.epoch_order import Place, epoch_order, walk
from datamodules.stream.example_columns import Columns
from datamodules.stream.preprocessing import PreparedDocument, take_skipped
from datamodules.stream.splits import SPLITS, Split, input_key, split_document
from datamodules.tasks.base import finding_content

if TYPE_CHECKING:
    from datamodules.findings import FindingsDataModule
    from datamodules.records import Document
    from datamodules.sources import RawDocument
    from datamodules.tokenization.chat_format import Example

MODES: tuple[Packing, ...] = get_args(Packing)


def scan_dataset(
    data: FindingsDataModule,
    *,
    devices: int = 1,
    limit: int | None = None,
    near_duplicates: int = 0,
    progress: Callable[[DatasetSummary, Place], None] = lambda _, __: None,
) -> DatasetSummary:
    """Reads the sources once, in the order of epoch 0, and returns their statistics.

    Args:
        data: data module; :meth:`FindingsDataModule.setup` is called.
        devices: number of devices of the run; blocks emit multiples of ``batch_size`` times this number of rows.
        limit: number of findings after which reading stops, at the end of a document; None reads all.
        near_duplicates: largest number of distinct findings to compare with each other.
        progress: called after each document.

    Raises:
        UserError: the sources can't be read, or an option has an unsupported value.
    """
    data.setup("inspect")
    summary = DatasetSummary(near=NearDuplicates(near_duplicates) if near_duplicates else None)
    documents = _DocumentCounter(data, summary).training_documents(limit, progress)
    _pack_epoch(data, documents, summary, rows_multiple=data.batch_size * devices)
    return summary


def _pack_epoch(
    data: FindingsDataModule, documents: Iterator[PreparedDocument], summary: DatasetSummary, *, rows_multiple: int
) -> None:
    """Packs the examples of each block in every mode.

    The modes differ only after the selection of a block's examples. So the examples are selected once, and each mode
    continues with a copy of the block's random generator and with the examples that its own last block carried over.
    """
    configs = {mode: data.block_config(mode) for mode in MODES}
    shared = configs[data.packing]
    seen, counters = Deduplicator(), PipelineCounters(max_quarantine=1.0)
    carry: dict[Packing, list[Example]] = {mode: [] for mode in MODES}
    summary.packed = {mode: PackingStatistics(data.sequence_length) for mode in MODES}
    for index, (gathered, final) in enumerate(group_documents(documents, shared)):
        rng = block_rng(shared, 0, index)
        examples: list[Example] = []
        if gathered:
            columns = Columns.join([document.columns for document in gathered])
            examples = select_examples(columns, shared, seen, counters, rng, epoch=0)
        for mode, config in configs.items():
            rows, emit, rest = pack_block(
                examples + carry[mode], config, deepcopy(rng), rows_multiple=rows_multiple, final=final
            )
            carry[mode] = [example for row in rest for example in row.examples]
            summary.packed[mode].add(rows[:emit])
            if mode == data.packing:
                summary.counts["unsupervised"] += sum(_unsupervised(row, data.sequence_length) for row in rows[:emit])
                if summary.sample is None and rows:
                    summary.sample = rows[0].examples[0]


def _unsupervised(row: Row, sequence_length: int) -> int:
    """Returns the number of examples of a row that have no label in its training batch."""
    batch = to_batch([row], sequence_length)
    labelled = batch.segment_ids_BT[batch.labels_BT != IGNORE_INDEX]
    return len(row.examples) - int(labelled[labelled > 0].unique().numel())


class _DocumentCounter:
    """Reads and encodes documents, and adds their records and examples to the summary."""

    def __init__(self, data: FindingsDataModule, summary: DatasetSummary) -> None:
        self.data, self.summary = data, summary
        self.processor = data.document_processor
        self.seen = {split: Deduplicator() for split in SPLITS}
        self.inputs = HashSet()

    def training_documents(
        self, limit: int | None, progress: Callable[[DatasetSummary, Place], None]
    ) -> Iterator[PreparedDocument]:
        """Reads all documents, and yields their training examples."""
        sources = self.processor.sources
        for place, _, raw in walk(sources, epoch_order(sources, epoch=0, seed=self.data.seed)):
            if limit is not None and self.summary.counts["findings"] >= limit:
                self.summary.complete = False
                return
            assert raw is not None  # no cache is used
            yield PreparedDocument(place, self._read(raw))
            progress(self.summary, place)

    def _read(self, raw: RawDocument) -> Columns:
        """Counts a document; returns its training examples."""
        parsed, counts = parse(raw), self.summary.counts
        counts.update(
            documents=int(parsed.records > 0),  # a generation report has no records and is not counted
            records=parsed.records,
            findings=len(parsed.document.findings),
            rationales=sum(bool(finding.rationale) for finding in parsed.document.findings),
            correlations=len(parsed.document.correlations),
        )
        self.summary.repairs.update(parsed.repairs)
        self.summary.quarantine.update(record.reason for record in parsed.quarantined)
        data = self.data
        parts = split_document(
            parsed.document, val_fraction=data.val_fraction, test_fraction=data.test_fraction, seed=data.seed
        )
        columns = {split: self._encode(part) for split, part in parts.items()}
        for split, part in parts.items():
            self.summary.splits[split].update(findings=len(part.findings), correlations=len(part.correlations))
            self._count(split, columns[split])
            self._compare(split, part)
        return columns["train"]

    def _encode(self, part: Document) -> Columns:
        if self.data.conflicts == "merge":
            part, merged = merge_conflicts(part)
            self.summary.counts["merged"] += merged
        examples: list[Example] = []
        for name, task in self.data.tasks.items():
            if pairs := list(task.pairs(part)):
                examples += self.data.chat.encode(task, pairs)
            self.summary.skipped.update({f"{name}: {reason}": n for reason, n in take_skipped(task).items()})
        return Columns.of(examples)

    def _count(self, split: Split, columns: Columns) -> None:
        summary, fits = self.summary, columns.lengths <= self.data.sequence_length
        tasks = columns.texts[0]
        summary.overflow.update(_count_names(columns, tasks[~fits]))
        indices = np.flatnonzero(fits)
        duplicate, conflict = self.seen[split].add(columns.keys[indices], columns.inputs[indices])
        summary.counts.update(duplicates=int(duplicate.sum()), conflicts=int(conflict.sum()))
        kept = indices[~(duplicate | (conflict & (self.data.conflicts != "keep")))]
        summary.splits[split]["examples"] += len(kept)
        summary.counts["unsupervised"] += int((columns.completions[kept] == 0).sum())
        for code in np.unique(tasks[kept]):
            name, of_task = columns.names[code], kept[tasks[kept] == code]
            summary.examples[name] += len(of_task)
            summary.trained[name] += len(of_task) if split == "train" else 0
            summary.severities[name].update(_count_names(columns, columns.texts[1, of_task]))
            summary.categories[name].update(_count_names(columns, columns.texts[2, of_task]))
            prompts, completions = columns.prompts[of_task], columns.completions[of_task]
            for part, values in (("prompt", prompts), ("completion", completions), ("total", prompts + completions)):
                summary.lengths[name][part].add(values)

    def _compare(self, split: Split, part: Document) -> None:
        """Compares the findings with new inputs to earlier ones, if near duplicates are requested."""
        near = self.summary.near
        if near is None or near.full or not part.findings:
            return
        new = self.inputs.add(np.array([input_key(finding) for finding in part.findings], np.uint64))
        for index in np.flatnonzero(new):
            near.add(finding_content(part.findings[index]), split)


def _count_names(columns: Columns, codes: np.ndarray) -> dict[str, int]:
    """Returns the number of occurrences of each code, by name."""
    values, counts = np.unique(codes, return_counts=True)
    return {columns.names[value]: int(count) for value, count in zip(values, counts, strict=True)}
