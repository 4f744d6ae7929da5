"""Documents -> blocks of rows: duplicates out, tasks mixed, severities balanced, shuffled, packed.

A block is some thousand examples, the unit in which order is random and from which a run resumes: everything that a
block depends on is in its :class:`BlockStart`. Rows that do not fill a group of batches, and each task's last, half
empty row, are not emitted: their examples open the next block (``carry``). So nothing is lost between blocks, rows are
full, and every rank can have the same number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from datamodules.errors import UserError
from datamodules.packing import Packing, Row, pack
from datamodules.stream.counters import PipelineCounters
from datamodules.stream.dedup import Deduplicator
from datamodules.stream.epoch_order import Place
from datamodules.stream.example_columns import Columns, to_tensor
from datamodules.stream.sampling import balance_copies, mixture_copies

if TYPE_CHECKING:
    from datamodules.stream.preprocessing import PreparedDocument
    from datamodules.tokenization.chat_format import Example

BalanceBy = Literal["severity", "category", "both"]


@dataclass(frozen=True)
class BlockConfig:
    """How blocks are made.

    Attributes:
        tasks: share of each task's examples that is used.
        sequence_length: T.
        packing: mode of :func:`datamodules.packing.pack`.
        block_examples: examples after which a block ends, at the end of a document.
        first_block: the same for an epoch's first block, which the first batch waits for.
        seed: of the shuffle.
        severity_balance: 0 every example once, 1 all strata of a task alike.
        balance_by: what the strata are.
        keep_conflicts: whether the same input may come with another answer.
        training: draw, repeat and drop the tail; else every example exactly once.
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
class BlockStart:
    """Everything that a block depends on, beside the documents themselves.

    Attributes:
        epoch: from 0.
        index: of the block in the epoch.
        place: of its first document; None for the epoch's beginning.
        carry: examples that the block before left over.
        seen: what was seen in this epoch; only its first ``seen_keys`` and ``seen_inputs`` belong to this start.
        ledger: counters and quarantine size before the block.
    """

    epoch: int = 0
    index: int = 0
    place: Place | None = None
    carry: list[Example] = field(default_factory=list)
    seen: Deduplicator = field(default_factory=Deduplicator)
    seen_keys: int = 0
    seen_inputs: int = 0
    ledger: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and texts, which ``torch.load(weights_only=True)`` reads."""
        return {
            "epoch": self.epoch,
            "block": self.index,
            "place": None if self.place is None else list(self.place),
            "carry": Columns.of(self.carry).state_dict(),
            "seen_keys": to_tensor(self.seen.keys.first(self.seen_keys)),
            "seen_inputs": to_tensor(self.seen.inputs.first(self.seen_inputs)),
            "ledger": self.ledger,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> BlockStart:
        """The inverse of :meth:`state_dict`."""
        keys, inputs = (state[name].numpy().view(np.uint64) for name in ("seen_keys", "seen_inputs"))
        carry = Columns.from_state_dict(state["carry"])
        return cls(
            epoch=state["epoch"],
            index=state["block"],
            place=None if state["place"] is None else Place(*state["place"]),
            carry=carry.select(range(len(carry))),
            seen=Deduplicator(keys, inputs),
            seen_keys=len(keys),
            seen_inputs=len(inputs),
            ledger=state["ledger"],
        )

    def fresh(self) -> BlockStart:
        """A start of its own set of seen keys, so that building the block twice gives the same block."""
        seen = Deduplicator(self.seen.keys.first(self.seen_keys), self.seen.inputs.first(self.seen_inputs))
        return BlockStart(
            self.epoch, self.index, self.place, self.carry, seen, self.seen_keys, self.seen_inputs, self.ledger
        )


@dataclass(slots=True)
class Block:
    """Rows of a block: ``rows[:emit]`` are for batches; the rest is carried on, or dropped as the epoch's tail."""

    start: BlockStart
    rows: list[Row]
    emit: int


def blocks(
    documents: Iterable[PreparedDocument],
    recipe: BlockConfig,
    start: BlockStart,
    ledger: PipelineCounters,
    *,
    rows_multiple: int,
    skip: int = 0,
) -> Iterator[Block]:
    """Gathers documents into blocks, to the end of the epoch.

    Args:
        documents: in the epoch's order, from ``start.place`` on.
        recipe: how.
        start: of the first block; it is owned by this call (see :meth:`BlockStart.fresh`).
        ledger: counts; its state belongs to ``start``.
        rows_multiple: rows come in multiples of it: batch rows times ranks.
        skip: rows of the first block that were consumed before.

    Raises:
        UserError: too much in quarantine; no example fits a row.
    """
    gathered: list[PreparedDocument] = []
    count = 0
    place = start.place or Place(0, 0, 0)
    for document in documents:
        if not gathered:
            place = document.place
        gathered.append(document)
        count += len(document.columns)
        if count >= (recipe.block_examples if start.index else recipe.first_block):
            start.place = place
            block, start = _build(gathered, recipe, start, ledger, rows_multiple=rows_multiple, skip=skip, final=False)
            yield block
            gathered, count, skip = [], 0, 0
    if gathered:
        start.place = place
    elif start.index:  # nothing but carry: no document is to be read again
        start.place = Place(np.iinfo(np.int64).max, 0, 0)
    yield _build(gathered, recipe, start, ledger, rows_multiple=rows_multiple, skip=skip, final=True)[0]
    ledger.check()


def _build(
    documents: list[PreparedDocument],
    recipe: BlockConfig,
    start: BlockStart,
    ledger: PipelineCounters,
    *,
    rows_multiple: int,
    skip: int,
    final: bool,
) -> tuple[Block, BlockStart]:
    """Makes one block and the start of the next."""
    for document in documents:
        ledger.add(document)
    rng = np.random.default_rng([recipe.seed, start.epoch, start.index])
    examples = _select(Columns.join([d.columns for d in documents]), recipe, start, ledger, rng) if documents else []
    examples += start.carry
    rows = pack(
        [examples[i] for i in rng.permutation(len(examples))],
        sequence_length=recipe.sequence_length,
        mode=recipe.packing,
    )
    rows = [rows[i] for i in rng.permutation(len(rows))]
    held: list[Row] = []
    if not final and recipe.packing != "none":
        rows, held = _hold_back(rows, recipe)
    emit = len(rows)
    if recipe.training or not final:
        emit = min(skip + max(len(rows) - skip, 0) // rows_multiple * rows_multiple, len(rows))
    rest = rows[emit:] + held
    if final:
        ledger.counts["tail"] += sum(len(row.examples) for row in rest)
    following = BlockStart(
        epoch=start.epoch,
        index=start.index + 1,
        carry=[example for row in rest for example in row.examples],
        seen=start.seen,
        seen_keys=len(start.seen.keys),
        seen_inputs=len(start.seen.inputs),
        ledger=ledger.state(),
    )
    return Block(start, rows, emit), following


def _select(
    columns: Columns, recipe: BlockConfig, start: BlockStart, ledger: PipelineCounters, rng: np.random.Generator
) -> list[Example]:
    """Examples of new documents, as often as they are to be used."""
    fits = columns.lengths <= recipe.sequence_length
    _check_overflow(columns, fits, recipe, start)
    indices = np.flatnonzero(fits)
    duplicate, conflict = start.seen.add(columns.keys[indices], columns.inputs[indices])
    unwanted = duplicate | (conflict & (not recipe.keep_conflicts))
    ledger.counts.update(overflow=int((~fits).sum()), duplicates=int(duplicate.sum()), conflicts=int(conflict.sum()))
    indices = indices[~unwanted]
    for code, count in enumerate(np.bincount(columns.texts[0, indices], minlength=len(columns.names)).tolist()):
        if count:
            ledger.counts[f"examples.{columns.names[code]}"] += count
    if recipe.training:
        shares = np.array([recipe.tasks.get(name, 0.0) for name in columns.names])[columns.texts[0, indices]]
        copies = mixture_copies(columns.keys[indices], shares, seed=recipe.seed, epoch=start.epoch)
        indices = _balance(columns, np.repeat(indices, copies), recipe, rng)
    return columns.select(indices)


def _balance(columns: Columns, indices: np.ndarray, recipe: BlockConfig, rng: np.random.Generator) -> np.ndarray:
    """Resamples each task's examples towards equal strata."""
    if recipe.severity_balance == 0 or len(indices) == 0:
        return indices
    task, severity, category = columns.texts[:, indices].astype(np.int64)
    n = len(columns.names)
    strata = {"severity": severity, "category": category, "both": severity * n + category}[recipe.balance_by]
    parts = []
    for code in np.unique(task):
        of_task = np.flatnonzero(task == code)
        parts.append(
            np.repeat(indices[of_task], balance_copies(strata[of_task], recipe.severity_balance, rng.random()))
        )
    return np.concatenate(parts)


def _hold_back(rows: list[Row], recipe: BlockConfig) -> tuple[list[Row], list[Row]]:
    """Takes out the emptiest row of each task: the next block fills it."""
    emptiest: dict[str, int] = {}
    for index, row in enumerate(rows):
        task = row.task if recipe.packing == "shared_prefix" else ""
        if task not in emptiest or row.tokens < rows[emptiest[task]].tokens:
            emptiest[task] = index
    held = set(emptiest.values())
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _check_overflow(columns: Columns, fits: np.ndarray, recipe: BlockConfig, start: BlockStart) -> None:
    """Stops a run whose rows are too short for every example.

    Raises:
        UserError: none of the first block's examples fits.
    """
    if len(fits) == 0 or fits.any() or start.index:
        return
    low, high = int(columns.lengths.min()), int(columns.lengths.max())
    raise UserError(
        f"data.init_args.sequence_length: {recipe.sequence_length} is less than each of the first {len(fits)} "
        "examples, prompt "
        f"and answer, of {low} to {high} tokens; set it to {low} at the very least, better to {high} or more"
    )
