"""FindingsStream: batches of findings, streamed, without Lightning."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from lightning.pytorch.utilities import rank_zero_info

from datamodules.errors import UserError
from datamodules.packing import Packing, Row, to_batch
from datamodules.stream.batching import DataShard, HeldOutRows, shard_batches
from datamodules.stream.blocks import BalanceBy, Block, BlockConfig, blocks
from datamodules.stream.counters import PipelineCounters
from datamodules.stream.epoch_order import epoch_order
from datamodules.stream.prefetch import prefetch
from datamodules.stream.preprocessing import Conflicts, DocumentProcessor, first_pairs
from datamodules.stream.resume import BlockStart, Cursor, ResumeState, beyond_data_error
from datamodules.stream.token_cache import TokenCache
from datamodules.stream.workers import DocumentStream, read_documents
from datamodules.validation import empty_epoch_error, empty_split_error

if TYPE_CHECKING:
    import torch

    from datamodules.batch import Batch
    from datamodules.stream.splits import Split
    from datamodules.tasks import Pair, Task
    from datamodules.tokenization.chat_format import ChatFormat

FIRST_TRAIN_BLOCK_EXAMPLES = 512  #: examples of the first training block: they take a quarter of a second
FIRST_EVAL_BLOCK_EXAMPLES = 128  #: held-out examples are few, and the sanity check waits for the first block
#: options that the sequence of training examples depends on
ORDER_OPTIONS = (
    "task_weights", "sequence_length", "packing", "val_fraction", "test_fraction", "seed", "severity_balance",
    "balance_by", "conflicts", "block_findings",
)  # fmt: skip


class FindingsStream:
    """Batches of findings for training and evaluation, streamed.

    An epoch of training continues after the last consumed batch, also if ``limit_train_batches`` ended Lightning's
    epoch early. Its tail of less than one batch per rank is dropped. Validation and test use each distinct example
    once.

    Args:
        sources: archives, folders, files, URLs or data set names.
        tokenizer: model name or path of the tokenizer and its chat template.
        task_weights: share of each task's examples that an epoch uses (above 1 repeats); None is risk scoring only.
        sequence_length: tokens per row, T.
        batch_size: rows per batch and rank, B.
        packing: ``none`` (one example per row), ``packed``, or ``shared_prefix`` (rows of one task, whose instruction
            is stored once per row).
        val_fraction: fraction of findings for validation, by a hash of their content.
        test_fraction: fraction of findings for test.
        seed: seed of split and order.
        severity_balance: 0 uses every example once, 1 resamples severities to equal numbers within a block.
        balance_by: property that ``severity_balance`` balances.
        conflicts: treatment of findings with equal input and different answers: ``keep`` all, ``drop`` all but the
            first, or ``merge`` by the median within a document and drop across documents.
        num_workers: reading processes; 0 reads in the training process.
        block_findings: number of examples that are shuffled and packed together.
        max_quarantine: largest allowed share of records that can't be used.
        quarantine_path: file (JSON Lines) for these records; None only counts them.
        cache_dir: folder for tokenized documents and source indexes; None stores no tokenized documents.
        risk_rationale: whether the risk task trains the rationale of findings that have one.
        storage_options: options of fsspec, for remote sources.
        val_rows: largest number of validation rows, on all ranks together; None is all.
        val_packing: packing of validation and test; None is ``packing``.
        prefetch_batches: batches that a thread prepares ahead; 0 prepares each batch at its request.

    Attributes:
        document_processor: opens sources, tasks and tokenizer, and prepares documents.
        extras: computes the additional tensors of a batch (``Batch.extras``) from its rows, for objectives; or None.
        steps_per_epoch: batches per rank in an epoch; None until an epoch was read to its end.
        sources_changed: whether the files differ from those of the checkpoint whose position was loaded.
    """

    def __init__(
        self,
        sources: list[str],
        tokenizer: str,
        task_weights: dict[str, float] | None = None,
        sequence_length: int = 2048,
        batch_size: int = 1,
        packing: Packing = "packed",
        val_fraction: float = 0.02,
        test_fraction: float = 0.02,
        seed: int = 0,
        severity_balance: float = 0.0,
        balance_by: BalanceBy = "severity",
        conflicts: Conflicts = "keep",
        num_workers: int = 1,
        block_findings: int = 4096,
        max_quarantine: float = 0.01,
        quarantine_path: str | None = None,
        cache_dir: str | None = None,
        risk_rationale: bool = False,
        storage_options: dict[str, Any] | None = None,
        val_rows: int | None = None,
        val_packing: Packing | None = None,
        prefetch_batches: int = 4,
    ) -> None:
        super().__init__()  # of LightningDataModule in the subclass
        self.task_weights = dict(task_weights) if task_weights is not None else {"risk": 1.0}
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.packing, self.val_packing = packing, val_packing
        self.seed, self.conflicts = seed, conflicts
        self.severity_balance, self.balance_by = severity_balance, balance_by
        self.val_fraction, self.test_fraction, self.val_rows = val_fraction, test_fraction, val_rows
        self.num_workers, self.block_findings, self.prefetch_batches = num_workers, block_findings, prefetch_batches
        self.max_quarantine, self.quarantine_path, self.cache_dir = max_quarantine, quarantine_path, cache_dir
        self.document_processor = DocumentProcessor(
            sources=sources, tokenizer=tokenizer, tasks=list(self.task_weights), val_fraction=val_fraction,
            test_fraction=test_fraction, seed=seed, conflicts=conflicts, risk_rationale=risk_rationale,
            storage_options=storage_options, cache_dir=cache_dir,
        )  # fmt: skip
        self.extras: Callable[[Sequence[Row]], dict[str, torch.Tensor]] | None = None
        self.steps_per_epoch: int | None = None
        self.sources_changed = self._is_resumed = False
        self._fingerprints: list[str] | None = None
        self._resume = ResumeState()
        self._counters = PipelineCounters(max_quarantine)  # of the training epoch that was read last
        self._held_out = HeldOutRows()

    @property
    def chat(self) -> ChatFormat:
        """The tokenizer's chat format."""
        return self.document_processor.chat

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks by name."""
        return self.document_processor.tasks

    @property
    def counts(self) -> dict[str, int]:
        """Counters of the training epoch that was read last; see ``stream.counters.PipelineCounters``."""
        return dict(self._counters.counts)

    def settings(self) -> dict[str, Any]:
        """Returns the options that the sequence of examples depends on, in addition to the data."""
        return {name: getattr(self, name) for name in ORDER_OPTIONS}

    def fingerprint(self) -> str:
        """Returns a digest of the sources and of all options that affect the batches."""
        content = [self.source_fingerprints(), self.chat.fingerprint(), self.settings(), self.batch_size]
        return hashlib.blake2b(orjson.dumps(content), digest_size=16).hexdigest()

    def source_fingerprints(self) -> list[str]:
        """Returns a digest per source, of names, sizes and times, when the sources were opened."""
        if self._fingerprints is None:  # a digest of a data set on the hub is a request
            self._fingerprints = [source.fingerprint() for source in self.document_processor.sources]
        return self._fingerprints

    def block_config(self, packing: Packing, *, training: bool = True) -> BlockConfig:
        """Returns the settings of the blocks in a packing mode, for training or for evaluation."""
        first_block = FIRST_TRAIN_BLOCK_EXAMPLES if training else FIRST_EVAL_BLOCK_EXAMPLES
        return BlockConfig(
            tasks=self.task_weights, sequence_length=self.sequence_length, packing=packing,
            block_examples=self.block_findings, first_block=min(first_block, self.block_findings), seed=self.seed,
            severity_balance=self.severity_balance, balance_by=self.balance_by,
            keep_conflicts=self.conflicts == "keep", training=training,
        )  # fmt: skip

    def train_batches(self, epoch: int | None = 0, shard: DataShard | None = None) -> Iterator[Batch]:
        """Yields training batches to the end of an epoch.

        Args:
            epoch: number of the epoch, from 0; None continues after the last consumed batch.
            shard: rank and number of ranks; None is one rank.

        Raises:
            UserError: the data can't be used, or is less than one batch for every rank.
        """
        shard = shard or DataShard()
        start = self._resume.cursor if epoch is None else Cursor(BlockStart(epoch))
        count, started, number = 0, time.monotonic(), start.start.epoch
        quarantine_path = self.quarantine_path if shard.rank == 0 and number == 0 else None
        counters = self._counters = PipelineCounters(self.max_quarantine, quarantine_path, start.start.counters)
        batches = self._open_batches("train", start, shard, counters)
        for batch in prefetch(batches, self.prefetch_batches, lambda item: self._to_batch(*item)):
            if not count and not start.at_epoch_start:
                seconds = time.monotonic() - started
                rank_zero_info(f"resumed at epoch {number}, {start.start.place}, row {start.rows}, in {seconds:.1f} s")
            count += 1
            yield batch
        counters.close()
        if count:
            self.steps_per_epoch = count if start.at_epoch_start else self.steps_per_epoch
        elif start.at_epoch_start:
            raise empty_epoch_error(
                self.document_processor.specs, list(self.task_weights), counters.counts,
                batch_size=self.batch_size, ranks=shard.ranks,
            )  # fmt: skip
        elif self.sources_changed:
            raise beyond_data_error(self.document_processor.specs)
        else:  # resumed on more ranks: the rest of the epoch is less than one batch for each of them
            self._resume.cursor = start.next_epoch()
            yield from self.train_batches(None, shard)

    def mark_consumed(self, batch: Batch) -> None:
        """Records that a batch of :meth:`train_batches` was trained on; Lightning's loop does it automatically."""
        assert isinstance(batch.cursor, Cursor)
        self._resume.mark_consumed(batch.cursor)

    def eval_batches(self, split: Split, shard: DataShard | None = None) -> Iterator[Batch]:
        """Yields the batches of a held-out split.

        The last batch may have rows of padding, so that every rank has the same number of batches.

        Args:
            split: ``val`` or ``test``.
            shard: rank and number of ranks; None is one rank.

        Raises:
            UserError: the split is empty.
        """
        shard = shard or DataShard()
        rows = self._held_out.get(split, shard)
        if rows is None:
            counters = PipelineCounters(self.max_quarantine)
            batches = self._open_batches(split, Cursor(BlockStart()), shard, counters)
            rows = self._held_out.record(split, shard, batches)
        empty = True
        for batch in prefetch(rows, self.prefetch_batches, self._to_batch):
            empty = False
            yield batch
        if empty:
            raise empty_split_error(split, getattr(self, f"{split}_fraction"))

    def read_rows(self, split: Split, epoch: int = 0, *, ranks: int = 1) -> Iterator[tuple[list[Row], int]]:
        """Reads the rows of one epoch, or of one evaluation of a held-out split, one block at a time.

        Args:
            split: the split to read.
            epoch: number of the epoch, from 0.
            ranks: number of ranks that share the rows.

        Yields:
            A block's rows, and how many of them are used in this block; the next block contains the others again.
        """
        start, counters = Cursor(BlockStart(epoch)), PipelineCounters(self.max_quarantine)
        for block in self._open_blocks(split, start, counters, rows_multiple=self.batch_size * ranks):
            yield block.rows, block.emit

    def max_rows(self, split: Split) -> int | None:
        """Returns the largest number of rows of a split, on all ranks together; None is all."""
        return self.val_rows if split == "val" else None

    def pairs(self, split: Split, task: str, limit: int, *, balanced: bool = False) -> list[Pair]:
        """Returns the first distinct pairs of a split, in the order of epoch 0.

        Args:
            split: the split to read.
            task: one of the configured tasks.
            limit: largest number of pairs.
            balanced: return equal numbers of each severity as far as the data has them; pairs of other severities
                replace missing ones. Reads at most 50 pairs per requested one.

        Raises:
            UserError: the task is not configured.
        """
        if task not in self.tasks:
            raise UserError(
                f"data.init_args.task_weights={self.task_weights}: task {task!r} is missing. Fix: add it there"
            )
        return first_pairs(self.document_processor, split, task, limit, balanced=balanced, seed=self.seed)

    def _open_batches(
        self, split: Split, start: Cursor, shard: DataShard, counters: PipelineCounters
    ) -> Iterator[tuple[list[Row], Cursor]]:
        """Starts the reading processes before it returns; yields a rank's batches as rows and cursors."""
        opened = self._open_blocks(split, start, counters, rows_multiple=self.batch_size * shard.ranks)
        return shard_batches(opened, start, shard, batch_size=self.batch_size, limit=self.max_rows(split))

    def _open_blocks(
        self, split: Split, start: Cursor, counters: PipelineCounters, *, rows_multiple: int
    ) -> Iterator[Block]:
        training = split == "train"
        packing = self.packing if training else self.val_packing or self.packing
        config = self.block_config(packing, training=training)
        order = epoch_order(self.document_processor.sources, epoch=start.start.epoch, seed=self.seed)
        cache = TokenCache(self.cache_dir, self.document_processor, split) if self.cache_dir else None
        stream = DocumentStream(self.document_processor, split, order, start.start.place, cache)
        documents = read_documents(stream, self.num_workers)
        return blocks(documents, config, start.start.copy(), counters, rows_multiple=rows_multiple, skip=start.rows)

    def _to_batch(self, rows: list[Row], cursor: Cursor | None = None) -> Batch:
        batch = to_batch(rows, self.sequence_length, batch_size=self.batch_size)
        batch.cursor = cursor
        batch.extras = self.extras(rows) if self.extras is not None else None
        return batch.pin_memory() if self._pins_memory() else batch

    def _pins_memory(self) -> bool:
        """Whether batches are copied to pinned memory, for a fast transfer to the GPU."""
        return False
