"""Position in the training data: all state from which a run resumes, and its form in a checkpoint.

:class:`BlockStart` is the state before a block, :class:`Cursor` a position within a block, and :class:`ResumeState` the
cursor of the last batch that training consumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.errors import UserError
from datamodules.stream.dedup import Deduplicator
from datamodules.stream.epoch_order import WHOLE, Place, epoch_order
from datamodules.stream.example_columns import Columns, to_tensor

if TYPE_CHECKING:
    from datamodules.packing import Row
    from datamodules.stream.preprocessing import DocumentProcessor
    from datamodules.tokenization.chat_format import Example

#: options that decide which findings are held out, and the order of the others
SPLIT_OPTIONS = ("seed", "val_fraction", "test_fraction")


@dataclass(slots=True)
class BlockStart:
    """State that a block depends on, in addition to the documents themselves.

    Attributes:
        epoch: from 0.
        index: index of the block in the epoch.
        place: place of its first document; None at the beginning of the epoch.
        carry: examples left over by the previous block.
        seen: keys seen in this epoch; only the first ``seen_keys`` and ``seen_inputs`` of them belong to this start.
        seen_keys: number of example keys seen before the block.
        seen_inputs: number of input keys seen before the block.
        counters: counters and quarantine size before the block.
    """

    epoch: int = 0
    index: int = 0
    place: Place | None = None
    carry: list[Example] = field(default_factory=list)
    seen: Deduplicator = field(default_factory=Deduplicator)
    seen_keys: int = 0
    seen_inputs: int = 0
    counters: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, numbers and strings, which ``torch.load(weights_only=True)`` reads."""
        return {
            "epoch": self.epoch,
            "block": self.index,
            "place": None if self.place is None else list(self.place),
            "carry": Columns.of(self.carry).state_dict(),
            "seen_keys": to_tensor(self.seen.keys.first(self.seen_keys)),
            "seen_inputs": to_tensor(self.seen.inputs.first(self.seen_inputs)),
            "counters": self.counters,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> BlockStart:
        """Returns the start that :meth:`state_dict` was called on."""
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
            counters=state["counters"],
        )

    def copy(self) -> BlockStart:
        """Returns a start with its own set of seen keys, so that building the block twice gives the same block."""
        seen = Deduplicator(self.seen.keys.first(self.seen_keys), self.seen.inputs.first(self.seen_inputs))
        return BlockStart(
            self.epoch, self.index, self.place, self.carry, seen, self.seen_keys, self.seen_inputs, self.counters
        )


class Cursor:
    """Position in the data after a batch.

    It is not a dataclass, because Lightning's half-precision plugins convert the fields of dataclasses in a batch.

    Attributes:
        start: start of the block that the batch is from.
        rows: rows of the block that are consumed, on all ranks together.
        batches: batches that each rank consumed since training began.
        digest: digest of the keys of all examples consumed since training began, in order; the same on every rank.
        first: whether the batch is the first of its epoch.
        last: whether it is the last of its epoch.
    """

    __slots__ = ("batches", "digest", "first", "last", "rows", "start")

    def __init__(
        self, start: BlockStart, rows: int = 0, batches: int = 0, digest: str = "", first: bool = False
    ) -> None:
        self.start, self.rows, self.batches, self.digest = start, rows, batches, digest
        self.first, self.last = first, False

    @property
    def at_epoch_start(self) -> bool:
        """Whether nothing of the epoch is consumed."""
        return self.start.place is None and self.rows == 0

    def next_epoch(self) -> Cursor:
        """Returns the beginning of the epoch after this one."""
        return Cursor(BlockStart(self.start.epoch + 1), batches=self.batches, digest=self.digest)


def extend_digest(digest: str, rows: Sequence[Row]) -> str:
    """Extends a rolling digest by the example keys of rows, one row at a time, so that the batch size has no effect.

    Args:
        digest: hexadecimal digest of the rows before; empty at the beginning.
        rows: rows in the order in which they are consumed.
    """
    for row in rows:
        keys = np.array([example.key for example in row.examples], np.uint64).tobytes()
        digest = hashlib.blake2b(bytes.fromhex(digest) + keys, digest_size=16).hexdigest()
    return digest


class ResumeState:
    """Cursor after the last consumed batch, and its form in a checkpoint.

    Attributes:
        cursor: position from which reading continues.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Sets the cursor to the beginning of epoch 0."""
        self.cursor = Cursor(BlockStart())
        self._in_progress: tuple[Cursor, int] | None = None  # cursor before the current batch, and the batch's number

    def begin_batch(self, cursor: Cursor, number: int) -> None:
        """Records that a training step on a batch begins.

        Args:
            cursor: the batch's cursor.
            number: number of the batch since training began, from 1.
        """
        self._in_progress = self.cursor, number
        self.mark_consumed(cursor)

    def mark_consumed(self, cursor: Cursor) -> None:
        """Moves the cursor to the end of a batch."""
        self.cursor = cursor.next_epoch() if cursor.last else cursor

    def state_dict(self, finished: int | None) -> dict[str, Any]:
        """Returns tensors, numbers and strings, which ``torch.load(weights_only=True)`` reads.

        Args:
            finished: number of batches whose training step ended since training began. A batch that begun and is not
                among them was interrupted, and does not count as consumed. None counts every batch.
        """
        cursor = self.cursor
        if self._in_progress and finished is not None:
            before, number = self._in_progress
            cursor = before if finished < number else cursor
        return cursor.start.state_dict() | {
            "rows": cursor.rows,
            "batches": cursor.batches,
            "digest": cursor.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets the cursor to that of a checkpoint; workers, ranks and batch size may be others than before."""
        self.reset()
        start = BlockStart.from_state_dict(state)
        self.cursor = Cursor(start, state["rows"], state["batches"], state["digest"])


def compare_settings(saved: Mapping[str, Any], now: Mapping[str, Any], fitting: bool) -> None:
    """Compares the options that the sequence of examples depends on with those of a checkpoint.

    Args:
        saved: the options when the checkpoint was written.
        now: the configured options; they apply.
        fitting: whether a fit resumes.

    Raises:
        UserError: a fit resumes with another split or order: it would train on findings that were held out, and
            evaluate on findings that were trained on.
    """
    changed = [f"{name} {saved.get(name)} -> {value}" for name, value in now.items() if saved.get(name) != value]
    for name in SPLIT_OPTIONS if fitting else ():
        if saved.get(name) != now[name]:
            raise UserError(
                f"data.init_args.{name}={now[name]}: the checkpoint was trained with {saved.get(name)}; with another "
                "value, held-out findings would be trained on or an epoch would repeat records. "
                f"Fix: set it to {saved.get(name)}, or start a new run without --ckpt_path"
            )
    if changed:
        rank_zero_warn(f"data settings differ from the checkpoint's, resuming is not exact: {', '.join(changed)}")


def check_place(start: BlockStart, processor: DocumentProcessor, seed: int) -> None:
    """Checks that the document at which a block starts exists.

    Args:
        start: the state before the block.
        processor: opens the sources.
        seed: of the order of the epoch.

    Raises:
        UserError: the sources have fewer files or members.
    """
    if start.place is None:
        return
    order = epoch_order(processor.sources, epoch=start.epoch, seed=seed)
    place = start.place
    if place.unit >= len(order) or (order[place.unit].member != WHOLE and place.member != order[place.unit].member):
        raise beyond_data_error(processor.specs)


def beyond_data_error(sources: Sequence[str]) -> UserError:
    """Returns the error for a position at which the sources have no records."""
    return UserError(
        f"data.init_args.sources={list(sources)}: the checkpoint's position is beyond these data. Fix: give the "
        "sources of the run, or start a new run without --ckpt_path"
    )
