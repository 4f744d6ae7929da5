"""Reading processes: from an epoch's order to prepared documents.

With W processes, each one parses and tokenizes every W-th document. The loader takes documents from the processes in
turn, so they arrive in the epoch's order for every W.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.errors import UserError
from datamodules.stream.epoch_order import Place, Unit, walk

if TYPE_CHECKING:
    from datamodules.stream.preprocessing import DocumentProcessor, PreparedDocument
    from datamodules.stream.splits import Split
    from datamodules.stream.token_cache import TokenCache


class DocumentStream(IterableDataset["PreparedDocument | UserError"]):
    """Prepared documents of one split in an epoch's order; in a reading process, every W-th of them.

    Args:
        processor: prepares documents.
        split: the split whose examples are made.
        order: result of :func:`datamodules.stream.epoch_order.epoch_order`.
        start: first document; None starts at the beginning of the epoch.
        cache: stores prepared documents, or None.
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
            known_documents = self.cache.documents if self.cache else None
            walked = walk(self.processor.sources, self.order, self.start, known_documents)
            if self.cache:
                walked = self.cache.record(walked, self.order, resumed=self.start is not None, write=worker == 0)
            for index, (place, unit, raw) in enumerate(walked):
                if index % workers == worker:
                    yield self._prepare(place, unit, raw)
        except UserError as error:  # an exception that a worker raises reaches the user wrapped in a traceback
            yield error

    def _prepare(self, place: Place, unit: Unit, raw: Any) -> PreparedDocument:
        if self.cache and (document := self.cache.load(unit, place)):
            return document
        raw = self.processor.read_again(unit, place.position) if raw is None else raw
        document = self.processor.prepare(place, raw, self.split)
        if self.cache:
            self.cache.save(unit, document)
        return document


def read_documents(stream: DocumentStream, num_workers: int) -> Iterator[PreparedDocument]:
    """Reads a stream in reading processes, which are started before this function returns.

    Args:
        stream: the documents.
        num_workers: number of reading processes; 0 reads in this process.

    Raises:
        UserError: a reading process met one; raised by the iterator.
    """
    # The loader draws a seed. Its own generator keeps torch's global state equal in resumed and uninterrupted runs.
    loader: DataLoader[Any] = DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    return _raise_errors(iter(loader))


def _raise_errors(documents: Iterator[PreparedDocument | UserError]) -> Iterator[PreparedDocument]:
    for document in documents:
        if isinstance(document, UserError):
            raise document
        yield document


def _identity(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process saves a checkpoint first and then ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
