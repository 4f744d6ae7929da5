"""Documents to blocks of rows: duplicates removed, tasks mixed, severities balanced, shuffled, packed.

A block has some thousand examples. It is the unit within which the order is random, and from whose start a run resumes:
:class:`datamodules.stream.resume.BlockStart` holds everything that a block depends on. Rows that do not fill a group
of batches, and the emptiest row of each task, are not emitted; their examples open the next block (``carry``). So no
example is lost between blocks, rows are full, and every rank can have the same number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from datamodules.errors import UserError
from datamodules.packing import Packing, Row, pack
from datamodules.stream.epoch_order import Place
from datamodules.stream.example_columns import Columns
from datamodules.stream.resume import BlockStart
from datamodules.stream.sampling import balance_copies, mixture_copies

if TYPE_CHECKING:
    from datamodules.stream.counters import PipelineCounters
    from datamodules.stream.dedup import Deduplicator
    from datamodules.stream.preprocessing import PreparedDocument
    from datamodules.tokenization.chat_format import Example

BalanceBy = Literal["severity", "category", "both"]


@dataclass(frozen=True)
class BlockConfig:
    """Settings of blocks.

    Attributes:
        tasks: weight of each task: the share of its examples that is used.
        sequence_length: T.
        packing: mode of :func:`datamodules.packing.pack`.
        block_examples: number of examples after which a block ends, at the end of a document.
        first_block: the same number for an epoch's first block, for which the first batch waits.
        seed: seed of the shuffle.
        severity_balance: 0 uses every example once, 1 resamples all strata of a task to equal sizes.
        balance_by: property that defines the strata.
        keep_conflicts: whether examples of equal input and different answers are used.
        training: whether to sample, repeat and drop the tail; otherwise every example is used exactly once.
    """

    tasks: dict[str, float]
    sequence_length: int
    packing: Packing
    block_examples: int
    first_block: int
    seed: int
    severity_balance: float = 0.0
    balance_by: BalanceBy = "severity"
    keep_conflicts: bool = True
    training: bool = True


@dataclass(slots=True)
class Block:
    """Rows of a block. ``rows[:emit]`` are for batches; the rest is carried over, or dropped as the epoch's tail."""

    start: BlockStart
    rows: list[Row]
    emit: int


def blocks(
    documents: Iterable[PreparedDocument],
    config: BlockConfig,
    start: BlockStart,
    counters: PipelineCounters,
    *,
    rows_multiple: int,
    skip: int = 0,
) -> Iterator[Block]:
    """Builds blocks from documents, to the end of the epoch.

    Args:
        documents: documents in the epoch's order, from ``start.place`` on.
        config: settings of the blocks.
        start: start of the first block. This function changes it (see :meth:`BlockStart.copy`).
        counters: counters whose state belongs to ``start``.
        rows_multiple: blocks emit multiples of this number of rows: batch size times ranks.
        skip: rows of the first block that were consumed before.

    Raises:
        UserError: too many records are quarantined; no example fits a row.
    """
    for gathered, final in group_documents(documents, config, first_index=start.index):
        if gathered:
            start.place = gathered[0].place
        elif start.index:  # only carried examples are left: no document has to be read again
            start.place = Place(np.iinfo(np.int64).max, 0, 0)
        for document in gathered:
            counters.add(document)
        rng = block_rng(config, start.epoch, start.index)
        examples: list[Example] = []
        if gathered:
            columns = Columns.join([document.columns for document in gathered])
            if start.index == 0:
                _check_overflow(columns, config)
            examples = select_examples(columns, config, start.seen, counters, rng, epoch=start.epoch)
        rows, emit, rest = pack_block(
            examples + start.carry, config, rng, rows_multiple=rows_multiple, skip=skip, final=final
        )
        if final:
            counters.counts["tail"] += sum(len(row.examples) for row in rest)
        following = BlockStart(
            epoch=start.epoch,
            index=start.index + 1,
            carry=[example for row in rest for example in row.examples],
            seen=start.seen,
            seen_keys=len(start.seen.keys),
            seen_inputs=len(start.seen.inputs),
            counters=counters.state(),
        )
        yield Block(start, rows, emit)
        start, skip = following, 0
    counters.check()


def group_documents(
    documents: Iterable[PreparedDocument], config: BlockConfig, *, first_index: int = 0
) -> Iterator[tuple[list[PreparedDocument], bool]]:
    """Divides an epoch's documents into the documents of one block each.

    Args:
        documents: documents in the epoch's order.
        config: settings of the blocks.
        first_index: index of the first block in the epoch.

    Yields:
        A block's documents, and whether it is the last block of the epoch; the last one may have no documents.
    """
    gathered: list[PreparedDocument] = []
    count, index = 0, first_index
    for document in documents:
        gathered.append(document)
        count += len(document.columns)
        if count >= (config.block_examples if index else config.first_block):
            yield gathered, False
            gathered, count, index = [], 0, index + 1
    yield gathered, True


def block_rng(config: BlockConfig, epoch: int, index: int) -> np.random.Generator:
    """Returns the random generator of a block: a function of seed, epoch and the block's index."""
    return np.random.default_rng([config.seed, epoch, index])


def select_examples(
    columns: Columns,
    config: BlockConfig,
    seen: Deduplicator,
    counters: PipelineCounters,
    rng: np.random.Generator,
    *,
    epoch: int,
) -> list[Example]:
    """Returns the examples of new documents, each as often as it is used.

    Args:
        columns: examples of the block's documents.
        config: settings of the blocks.
        seen: keys of the epoch's earlier examples; the new ones are added.
        counters: counts used and dropped examples.
        rng: the block's generator.
        epoch: from 0.
    """
    fits = columns.lengths <= config.sequence_length
    indices = np.flatnonzero(fits)
    duplicate, conflict = seen.add(columns.keys[indices], columns.inputs[indices])
    unwanted = duplicate | (conflict & (not config.keep_conflicts))
    counters.counts.update(overflow=int((~fits).sum()), duplicates=int(duplicate.sum()), conflicts=int(conflict.sum()))
    indices = indices[~unwanted]
    for code, count in enumerate(np.bincount(columns.texts[0, indices], minlength=len(columns.names)).tolist()):
        if count:
            counters.counts[f"examples.{columns.names[code]}"] += count
    if config.training:
        weights = np.array([config.tasks.get(name, 0.0) for name in columns.names])[columns.texts[0, indices]]
        copies = mixture_copies(columns.keys[indices], weights, seed=config.seed, epoch=epoch)
        indices = _balance(columns, np.repeat(indices, copies), config, rng)
    return columns.select(indices)


def pack_block(
    examples: list[Example],
    config: BlockConfig,
    rng: np.random.Generator,
    *,
    rows_multiple: int,
    skip: int = 0,
    final: bool,
) -> tuple[list[Row], int, list[Row]]:
    """Shuffles and packs the examples of a block.

    Args:
        examples: the block's own examples, and after them the carried ones.
        config: settings of the blocks.
        rng: the block's generator.
        rows_multiple: the number of emitted rows, without the skipped ones, is a multiple of it in training.
        skip: rows that were consumed before.
        final: whether it is the last block of the epoch.

    Returns:
        Rows, the number of them to emit, and the rows that are not emitted: the next block gets their examples.
    """
    rows = pack(
        [examples[i] for i in rng.permutation(len(examples))],
        sequence_length=config.sequence_length,
        mode=config.packing,
    )
    rows = [rows[i] for i in rng.permutation(len(rows))]
    held_back: list[Row] = []
    if not final and config.packing != "none":
        rows, held_back = _hold_back(rows, config)
    emit = len(rows)
    if config.training or not final:
        emit = min(skip + max(len(rows) - skip, 0) // rows_multiple * rows_multiple, len(rows))
    return rows, emit, rows[emit:] + held_back


def _balance(columns: Columns, indices: np.ndarray, config: BlockConfig, rng: np.random.Generator) -> np.ndarray:
    """Resamples each task's examples towards strata of equal size."""
    if config.severity_balance == 0 or len(indices) == 0:
        return indices
    task, severity, category = columns.texts[:, indices].astype(np.int64)
    n = len(columns.names)
    strata = {"severity": severity, "category": category, "both": severity * n + category}[config.balance_by]
    parts = []
    for code in np.unique(task):
        of_task = np.flatnonzero(task == code)
        copies = balance_copies(strata[of_task], config.severity_balance, rng.random())
        parts.append(np.repeat(indices[of_task], copies))
    return np.concatenate(parts)


def _hold_back(rows: list[Row], config: BlockConfig) -> tuple[list[Row], list[Row]]:
    """Separates the emptiest row of each task from the others: the next block fills it."""
    emptiest: dict[str, int] = {}
    for index, row in enumerate(rows):
        task = row.task if config.packing == "shared_prefix" else ""
        if task not in emptiest or row.tokens < rows[emptiest[task]].tokens:
            emptiest[task] = index
    held_back = set(emptiest.values())
    return [row for i, row in enumerate(rows) if i not in held_back], [rows[i] for i in sorted(held_back)]


def _check_overflow(columns: Columns, config: BlockConfig) -> None:
    """Stops a run whose rows are too short for every example.

    Args:
        columns: examples of an epoch's first block.
        config: settings of the blocks.

    Raises:
        UserError: none of them fits.
    """
    lengths = columns.lengths
    if len(lengths) == 0 or (lengths <= config.sequence_length).any():
        return
    low, high = int(lengths.min()), int(lengths.max())
    raise UserError(
        f"data.init_args.sequence_length={config.sequence_length}: shorter than each of the first {len(lengths)} "
        f"examples, which have {low} to {high} tokens (prompt and answer). Fix: set it to {low} at least, better to "
        f"{high} or more"
    )
