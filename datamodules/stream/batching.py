"""Rows to batches: distribution over ranks, and a cache for the rows of held-out splits.

Every rank prepares all documents (2,000 findings per second and core; a GPU needs 50) and computes the whole sequence
of batches. It keeps its own ones. So ranks agree on the number of steps without communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datamodules.stream.resume import Cursor, extend_digest

if TYPE_CHECKING:
    from datamodules.packing import Row
    from datamodules.stream.blocks import Block
    from datamodules.stream.splits import Split

MAX_CACHED_TOKENS = 1 << 24  #: of a held-out split, on all ranks together: 64 MiB, some 40,000 findings


@dataclass(frozen=True)
class DataShard:
    """A rank's part of the batches.

    Attributes:
        rank: from 0.
        ranks: number of ranks.
    """

    rank: int = 0
    ranks: int = 1


def shard_batches(
    blocks: Iterable[Block], start: Cursor, shard: DataShard, *, batch_size: int, limit: int | None = None
) -> Iterator[tuple[list[Row], Cursor]]:
    """Groups rows into batches, and assigns batches to ranks in turn.

    Args:
        blocks: blocks from ``start`` on.
        start: position in the first block.
        shard: the rank whose batches are yielded.
        batch_size: B. At the end of validation a batch may have fewer rows, or none. The caller adds rows of padding,
            so that every rank has the same number of batches of one shape.
        limit: largest number of rows, on all ranks together.

    Yields:
        A batch's rows and its cursor. One batch is buffered, because a batch's cursor has to record whether it is the
        last one.
    """
    group = batch_size * shard.ranks
    skip, count, digest, used = start.rows, start.batches, start.digest, 0
    ahead: tuple[list[Row], Cursor] | None = None
    for block in blocks:
        for first in range(skip, block.emit, group):
            rows = block.rows[first : min(first + group, block.emit)]
            if limit is not None:
                rows = rows[: limit - used]
            if not rows:
                break
            used, count, digest = used + len(rows), count + 1, extend_digest(digest, rows)
            if ahead is not None:
                yield ahead
            first_of_epoch = start.at_epoch_start and count == start.batches + 1
            cursor = Cursor(block.start, first + len(rows), count, digest, first=first_of_epoch)
            ahead = rows[shard.rank * batch_size : (shard.rank + 1) * batch_size], cursor
        skip = 0
        if limit is not None and used >= limit:
            break
    if ahead is not None:
        ahead[1].last = True
        yield ahead


class HeldOutRows:
    """Rows of the held-out splits that were read once, kept in memory for the next evaluation.

    Args:
        max_tokens: a split with more tokens, on all ranks together, is not kept and is read again each time.
    """

    def __init__(self, max_tokens: int = MAX_CACHED_TOKENS) -> None:
        self.max_tokens = max_tokens
        self._batches: dict[tuple[Split, DataShard], list[list[Row]]] = {}

    def get(self, split: Split, shard: DataShard) -> Iterator[list[Row]] | None:
        """Returns the rows of each batch of a rank, or None if they are not in memory."""
        batches = self._batches.get((split, shard))
        return None if batches is None else iter(batches)

    def record(
        self, split: Split, shard: DataShard, batches: Iterator[tuple[list[Row], Cursor]]
    ) -> Iterator[list[Row]]:
        """Yields the rows of each batch; keeps them if the iterator is read to its end and they are few enough."""
        kept: list[list[Row]] = []
        free = self.max_tokens // shard.ranks
        for rows, _ in batches:
            free -= sum(row.tokens for row in rows)
            if free >= 0:
                kept.append(rows)
            else:
                kept.clear()
            yield rows
        if free >= 0:
            self._batches[split, shard] = kept
