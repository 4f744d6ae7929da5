"""From an epoch's plan to batches: reading processes, ranks, the cursor, the prefetch thread.

A reading process parses and tokenises every W-th document; the loader takes documents from the processes in turn, so
they arrive in the epoch's order, whatever W is. Every rank prepares all documents (2,000 findings/s a core, where a
GPU needs 50) and knows the whole sequence of batches; it takes those that are its own. So ranks agree on the number of
steps with no message between them.
"""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.errors import UserError
from datamodules.stream.blocks import BlockStart
from datamodules.stream.epoch_order import Place, Unit, walk

if TYPE_CHECKING:
    from datamodules.packing import Row
    from datamodules.stream.blocks import Block
    from datamodules.stream.preprocessing import DocumentProcessor, PreparedDocument
    from datamodules.stream.splits import Split
    from datamodules.stream.token_cache import TokenCache

T = TypeVar("T")
U = TypeVar("U")


class DocumentStream(IterableDataset["PreparedDocument | UserError"]):
    """Prepared documents of one split in an epoch's order; in a reading process, every W-th of them.

    Args:
        processor: makes them.
        split: which.
        order: of :func:`datamodules.stream.epoch_order.epoch_order`.
        start: where to begin.
        cache: keeps prepared documents, or None.
    """

    def __init__(
        self,
        processor: DocumentProcessor,
        split: Split,
        order: Sequence[Unit],
        start: Place | None,
        cache: TokenCache | None,
    ) -> None:
        self.processor, self.split, self.order, self.start, self.cache = processor, split, order, start, cache

    def __iter__(self) -> Iterator[PreparedDocument | UserError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            sources = self.processor.sources
            walked = walk(sources, self.order, self.start, self.cache)
            if self.cache:
                walked = self.cache.follow(walked, self.order, resumed=self.start is not None, write=worker == 0)
            for index, (place, unit, raw) in enumerate(walked):
                if index % workers == worker:
                    yield self._prepare(place, unit, raw)
        except UserError as error:  # raised here it would reach the user wrapped in a traceback
            yield error

    def _prepare(self, place: Place, unit: Unit, raw: Any) -> PreparedDocument:
        if self.cache and (document := self.cache.load(unit, place)):
            return document
        raw = self.processor.read_again(unit, place.position) if raw is None else raw
        document = self.processor.prepare(place, raw, self.split)
        if self.cache:
            self.cache.save(unit, document)
        return document


def read_documents(stream: DocumentStream, workers: int) -> Iterator[PreparedDocument]:
    """Reads a stream with so many processes (0: in this one); they are started before this returns.

    Raises:
        UserError: of a reading process.
    """
    # a generator of its own: the loader draws a seed, and must not move torch's state away from an unresumed run's
    loader: DataLoader[Any] = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    return _checked(iter(loader))


def _checked(documents: Iterator[PreparedDocument | UserError]) -> Iterator[PreparedDocument]:
    for document in documents:
        if isinstance(document, UserError):
            raise document
        yield document


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides when reading ends, and saves first
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process


class Cursor:
    """What was consumed once a batch is. No dataclass: Lightning's half-precision plugins would walk into it.

    Attributes:
        start: of the block that the batch is from.
        rows: of the block that are consumed, on all ranks together.
        batches: consumed by each rank since training began.
        digest: of the keys of all examples consumed since training began, in order; the same on every rank.
        first: whether the batch is the first of its epoch.
        last: whether it is the last.
    """

    __slots__ = ("batches", "digest", "first", "last", "rows", "start")

    def __init__(
        self, start: BlockStart, rows: int = 0, batches: int = 0, digest: str = "", first: bool = False
    ) -> None:
        self.start, self.rows, self.batches, self.digest = start, rows, batches, digest
        self.first, self.last = first, False

    @property
    def fresh(self) -> bool:
        """Whether nothing of the epoch is consumed."""
        return self.start.place is None and self.rows == 0

    def next_epoch(self) -> Cursor:
        """The beginning of the epoch after this one."""
        return Cursor(BlockStart(self.start.epoch + 1), batches=self.batches, digest=self.digest)


@dataclass(frozen=True)
class DataShard:
    """A rank's part of the batches.

    Attributes:
        rank: from 0.
        ranks: how many there are.
    """

    rank: int = 0
    ranks: int = 1


def shard_batches(
    blocks: Iterable[Block], start: Cursor, share: DataShard, *, batch_size: int, limit: int | None = None
) -> Iterator[tuple[list[Row], Cursor]]:
    """Deals rows to batches, and batches to ranks in turn.

    Args:
        blocks: from ``start`` on.
        start: where the first block is entered.
        share: whose batches to yield.
        batch_size: B. At the end of validation a batch may have fewer rows, or none: to be filled with padding, so
            that every rank has equally many batches of one shape.
        limit: of rows, on all ranks together.

    Yields:
        A batch's rows and its cursor; one batch is held back to know which is the last.
    """
    group = batch_size * share.ranks
    skip, count, digest, taken = start.rows, start.batches, start.digest, 0
    ahead: tuple[list[Row], Cursor] | None = None
    for block in blocks:
        for first in range(skip, block.emit, group):
            rows = block.rows[first : min(first + group, block.emit)]
            if limit is not None:
                rows = rows[: limit - taken]
            if not rows:
                break
            taken, count, digest = taken + len(rows), count + 1, chain(digest, rows)
            if ahead is not None:
                yield ahead
            cursor = Cursor(
                block.start, first + len(rows), count, digest, first=start.fresh and count == start.batches + 1
            )
            ahead = rows[share.rank * batch_size : (share.rank + 1) * batch_size], cursor
        skip = 0
        if limit is not None and taken >= limit:
            break
    if ahead is not None:
        ahead[1].last = True
        yield ahead


def chain(digest: str, rows: Sequence[Row]) -> str:
    """Rolls a digest on over the example keys of rows, one row at a time, whatever the size of a batch."""
    for row in rows:
        keys = np.array([example.key for example in row.examples], np.uint64).tobytes()
        digest = hashlib.blake2b(bytes.fromhex(digest) + keys, digest_size=16).hexdigest()
    return digest


class Restartable(Generic[T]):
    """An iterable that starts anew whenever it is iterated; nothing happens before the first item is asked for.

    Lightning must find no length here (it is not known) and no state (the data module keeps it).

    Args:
        start: makes the iterator.
    """

    def __init__(self, start: Callable[[], Iterator[T]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[T]:
        yield from self._start()


def prefetch(items: Iterator[T], depth: int, transform: Callable[[T], U]) -> Iterator[U]:
    """Runs an iterator in a thread, ``depth`` items ahead; its exceptions are raised here.

    Closing the generator (also by Ctrl-C, or by dropping it) stops the thread.

    Args:
        items: only the thread touches it from here on.
        depth: of the bounded queue; 0 starts no thread.
        transform: of each item in the thread.
    """
    if depth == 0:
        yield from map(transform, items)
        return
    ahead: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ahead, stop, transform), name="prefetch", daemon=True)
    thread.start()
    del items  # the thread's frame holds the last reference, and with it the reading processes
    try:
        while True:
            more, item = ahead.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stop.set()
        thread.join(timeout=10)  # it may wait for a document; it is a daemon, so nothing waits for it longer


def _fill(items: Iterator[T], ahead: queue.Queue[Any], stop: threading.Event, transform: Callable[[T], Any]) -> None:
    def put(entry: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                ahead.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put((True, transform(item))):
                return
        put((False, None))
    except BaseException as error:  # the consumer raises it
        put((False, error))
    finally:
        close = getattr(items, "close", None)
        if close:
            close()
