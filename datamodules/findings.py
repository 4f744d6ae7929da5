"""FindingsDataModule: wires sources, tasks, tokenizer, packing and order; owns the resume state."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.errors import UserError
from datamodules.packing import Packing, Row, to_batch
from datamodules.stream.blocks import BalanceBy, Block, BlockConfig, BlockStart, blocks
from datamodules.stream.counters import PipelineCounters
from datamodules.stream.epoch_order import epoch_order
from datamodules.stream.loading import (
    Cursor,
    DataShard,
    DocumentStream,
    Restartable,
    prefetch,
    read_documents,
    shard_batches,
)
from datamodules.stream.pairs import first_pairs
from datamodules.stream.preprocessing import Conflicts, DocumentProcessor
from datamodules.stream.token_cache import TokenCache
from datamodules.validation import check_options, check_prefixes, nothing_to_train

if TYPE_CHECKING:
    from datamodules.batch import Batch
    from datamodules.stream.splits import Split
    from datamodules.tasks import Pair, Task
    from datamodules.tokenization.chat_format import ChatFormat

FIRST_BLOCK = 512  #: examples that the first training batch waits for: a quarter of a second
FIRST_EVAL_BLOCK = 128  #: held-out examples are few; the sanity check waits for these
KEPT_TOKENS = 1 << 24  #: a held-out split of up to so many tokens (64 MiB, some 40,000 findings) stays in memory


class FindingsDataModule(LightningDataModule):
    """Batches of findings for training and evaluation, streamed.

    An epoch of training goes on where the last consumed batch ended, also where ``limit_train_batches`` cut Lightning's
    epoch short; its tail of less than one batch for every rank is dropped. Validation and test use each distinct
    example once.

    Args:
        sources: archives, folders, files, URLs or data set names.
        tokenizer: model name or path that the tokenizer and its chat template come from.
        task_weights: share of each task's examples that an epoch uses (above 1 repeats); risk scoring alone where None.
        sequence_length: tokens a row, T.
        batch_size: rows a batch, B, on each rank.
        packing: ``none`` (one example a row), ``packed``, or ``shared_prefix`` (rows of one task, whose instruction
            stands once).
        val_fraction: share of findings for validation, by a hash of their content.
        test_fraction: share of findings for test.
        seed: of split and order.
        severity_balance: 0 uses every example once, 1 resamples severities to equal numbers within a block.
        balance_by: what ``severity_balance`` evens out.
        conflicts: the same input with another answer: ``keep`` both, ``drop`` all but the first, or ``merge`` by the
            median within a document and drop across documents.
        num_workers: reading processes; 0 reads in the training process.
        block_findings: examples that are shuffled and packed together.
        max_quarantine: greatest share of records that may be unusable.
        quarantine_path: file (JSON Lines) for unusable records; None counts only.
        cache_dir: folder for tokenised documents and source indexes; None keeps none.
        agent_templates: folder of the agent's prompt templates, for the tasks ``agent_*``.
        storage_options: of fsspec, for remote sources.
        val_rows: at most so many rows of validation, on all ranks together; None is all.
        val_packing: packing of validation and test; as ``packing`` where None.
        prefetch_batches: batches made ahead by a thread; 0 makes each when asked.
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
        agent_templates: str | None = None,
        storage_options: dict[str, Any] | None = None,
        val_rows: int | None = None,
        val_packing: Packing | None = None,
        prefetch_batches: int = 4,
    ) -> None:
        super().__init__()
        self.task_weights = dict(task_weights) if task_weights is not None else {"risk": 1.0}
        self.sequence_length, self.batch_size, self.packing, self.val_packing = (
            sequence_length,
            batch_size,
            packing,
            val_packing,
        )
        self.seed, self.severity_balance, self.balance_by, self.conflicts = (
            seed,
            severity_balance,
            balance_by,
            conflicts,
        )
        self.val_fraction, self.test_fraction, self.val_rows = val_fraction, test_fraction, val_rows
        self.num_workers, self.block_findings, self.prefetch_batches = num_workers, block_findings, prefetch_batches
        self.max_quarantine, self.quarantine_path, self.cache_dir = max_quarantine, quarantine_path, cache_dir
        self.document_processor = DocumentProcessor(
            sources=sources,
            tokenizer=tokenizer,
            tasks=list(self.task_weights),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            conflicts=conflicts,
            agent_templates=agent_templates,
            storage_options=storage_options,
            cache_dir=cache_dir,
        )
        #: what an objective wants beside a batch's rows (``Batch.extras``): rows -> tensors
        self.extras: Callable[[Sequence[Row]], dict[str, torch.Tensor]] | None = None
        self._cursor = Cursor(BlockStart())
        self._unfinished: tuple[Cursor, int] | None = None  # cursor before the batch in hand, and that batch's number
        self._ledger = PipelineCounters(max_quarantine)  # of the training epoch that was read last
        self._kept: dict[str, list[list[Row]]] = {}
        #: batches of a rank in an epoch; None until one was read to its end
        self.steps_per_epoch: int | None = None

    # ---------------------------------------------------------------- what the house asks of it

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
        return dict(self._ledger.counts)

    def setup(self, stage: str | None = None) -> None:
        """Opens sources, tasks and tokenizer, and checks what can be checked without reading.

        Raises:
            UserError: an option can't be served.
        """
        check_options(self)
        _ = self.document_processor.sources
        check_prefixes(self)
        if (
            stage == "fit"
            and self.trainer is not None
            and not self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        ):
            self._cursor, self._unfinished = Cursor(BlockStart()), None  # a new run; a checkpoint is loaded after this

    def teardown(self, stage: str) -> None:
        """Says at the end of a fit what its last epoch read, repaired and left out."""
        if stage == "fit" and self._ledger.counts:
            rank_zero_info(f"data of the last epoch, as far as it was read: {self._ledger.summary()}")

    def train_dataloader(self) -> Restartable[Batch]:
        """Training batches of this rank, from what was consumed to the end of the epoch."""
        return Restartable(self._train)

    def val_dataloader(self) -> Restartable[Batch] | list[Any]:
        """Validation batches of this rank, each example once; none where ``val_fraction`` is 0."""
        return Restartable(lambda: self.eval_batches("val", self._share)) if self.val_fraction else []

    def test_dataloader(self) -> Restartable[Batch] | list[Any]:
        """Test batches of this rank, each example once; none where ``test_fraction`` is 0."""
        return Restartable(lambda: self.eval_batches("test", self._share)) if self.test_fraction else []

    def train_batches(self, epoch: int = 0, share: DataShard | None = None) -> Iterator[Batch]:
        """Training batches of one epoch, without Lightning.

        Args:
            epoch: from 0.
            share: rank and number of ranks; one rank where None.

        Raises:
            UserError: the data can't be used, or is less than one batch for every rank.
        """
        yield from self._epoch(Cursor(BlockStart(epoch)), share or DataShard())

    def eval_batches(self, split: Split, share: DataShard | None = None) -> Iterator[Batch]:
        """Batches of a held-out split. The last may hold rows of padding; every rank has equally many.

        Raises:
            UserError: the split is empty.
        """
        share = share or DataShard()
        key = f"{split}-{share.rank}-{share.ranks}"
        if key in self._kept:
            yield from map(self._lay_out, self._kept[key])
            return
        kept: list[list[Row]] | None = []
        room, empty = KEPT_TOKENS // share.ranks, True
        dealt = self._shard(split, Cursor(BlockStart()), share, PipelineCounters(self.max_quarantine))
        for rows, batch in prefetch(dealt, self.prefetch_batches, lambda item: (item[0], self._lay_out(item[0]))):
            room -= sum(row.tokens for row in rows)
            if kept is not None and room >= 0:
                kept.append(rows)
            else:
                kept = None
            empty = False
            yield batch
        if empty:
            raise UserError(
                f"data.init_args.{split}_fraction: {getattr(self, split + '_fraction')} leaves no {split} "
                "example in this data; raise the "
                f"share, or set it to 0 to do without"
            )
        if kept is not None:
            self._kept[key] = kept

    def pairs(self, split: Split, task: str, limit: int, *, balanced: bool = False) -> list[Pair]:
        """The first distinct pairs of a split, in the order of epoch 0.

        Args:
            split: which.
            task: one of this module's tasks.
            limit: at most so many.
            balanced: equally many of each severity as far as the data has them; what is missing is filled up with the
                rest. Reads at most 50 pairs for each one asked for.

        Raises:
            UserError: the task is none of this module's.
        """
        if task not in self.tasks:
            raise UserError(f"data.init_args.task_weights: {task!r} is none of {sorted(self.tasks)}; add it there")
        return first_pairs(self.document_processor, split, task, limit, balanced=balanced, seed=self.seed)

    def first_uses(self, split: Split, epoch: int = 0, *, ranks: int = 1) -> Iterator[tuple[list[Row], int]]:
        """The rows of one epoch (of a held-out split: of its evaluation), a block at a time.

        Yields:
            A block's rows, and how many of them are dealt to ranks; the others come again in the next block.
        """
        rows_multiple = self.batch_size * ranks
        for block in self._blocks(
            split, Cursor(BlockStart(epoch)), PipelineCounters(self.max_quarantine), rows_multiple=rows_multiple
        ):
            yield block.rows, block.emit

    def fingerprint(self) -> str:
        """Digest of the sources and of everything that turns them into batches."""
        sources = [source.fingerprint() for source in self.document_processor.sources]
        facts = [sources, self.chat.fingerprint(), self._settings(), self.batch_size]
        return hashlib.blake2b(orjson.dumps(facts), digest_size=16).hexdigest()

    def recipe(self, packing: Packing, *, training: bool = True) -> BlockConfig:
        """How this module's blocks are made, packed so."""
        return BlockConfig(
            tasks=self.task_weights,
            sequence_length=self.sequence_length,
            packing=packing,
            block_examples=self.block_findings,
            first_block=min(FIRST_BLOCK if training else FIRST_EVAL_BLOCK, self.block_findings),
            seed=self.seed,
            severity_balance=self.severity_balance,
            balance_by=self.balance_by,
            keep_conflicts=self.conflicts == "keep",
            training=training,
        )

    # ---------------------------------------------------------------- resume

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Takes note of a training batch: Lightning calls this right before the step, not when it prefetches."""
        cursor = getattr(batch, "cursor", None)
        if isinstance(cursor, Cursor) and self.trainer is not None and self.trainer.training:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress
            if cursor.first:
                # a checkpoint of an epoch's last batch is resumed in the next epoch with the old epoch's batch count,
                # which would shift gradient accumulation (Lightning resets it only where the length is known)
                progress.current.reset()
            self._unfinished = self._cursor, progress.total.ready + 1
            self.consumed(batch)
        return batch

    def consumed(self, batch: Batch) -> None:
        """Notes that a batch of :meth:`train_batches` was trained on; Lightning's loop does it by itself."""
        cursor = batch.cursor
        assert isinstance(cursor, Cursor)
        self._cursor = cursor.next_epoch() if cursor.last else cursor

    def state_dict(self) -> dict[str, Any]:
        """What was consumed, for a checkpoint that ``torch.load(weights_only=True)`` reads."""
        cursor = self._cursor
        if self._unfinished and self.trainer is not None:  # interrupted in a step: its batch is not consumed
            before, number = self._unfinished
            if self.trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()["processed"] < number:
                cursor = before
        state = {"rows": cursor.rows, "batches": cursor.batches, "digest": cursor.digest, "settings": self._settings()}
        return cursor.start.state_dict() | state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint ended; with other workers, ranks or batch rows too."""
        saved, now = state_dict["settings"], self._settings()
        changed = [f"{name} {saved.get(name)} -> {value}" for name, value in now.items() if saved.get(name) != value]
        if changed:
            rank_zero_warn(f"data settings differ from the checkpoint's, resuming is not exact: {', '.join(changed)}")
        start = BlockStart.from_state_dict(state_dict)
        self._cursor = Cursor(start, state_dict["rows"], state_dict["batches"], state_dict["digest"])
        self._unfinished = None
        if self.trainer is not None and (fetcher := self.trainer.fit_loop._data_fetcher) is not None:
            iter(fetcher)  # `estimated_stepping_batches` may have opened the loader, and fetched, before this

    def _settings(self) -> dict[str, Any]:
        """What the sequence of examples depends on, beside the data."""
        return {
            "task_weights": self.task_weights, "sequence_length": self.sequence_length, "packing": self.packing,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction, "seed": self.seed, "severity_balance": self.severity_balance,
            "balance_by": self.balance_by,
            "conflicts": self.conflicts, "block_findings": self.block_findings,
        }  # fmt: skip

    # ---------------------------------------------------------------- wiring

    @property
    def _share(self) -> DataShard:
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return DataShard(kwargs["rank"], kwargs["num_replicas"]) if kwargs else DataShard()

    def _train(self) -> Iterator[Batch]:
        overfit = self.trainer is not None and getattr(self.trainer, "overfit_batches", False)
        yield from self._epoch(Cursor(BlockStart()) if overfit else self._cursor, self._share)

    def _epoch(self, start: Cursor, share: DataShard) -> Iterator[Batch]:
        """Batches from a cursor to the end of its epoch, or of the next where nothing is left of it."""
        began, count, epoch = time.monotonic(), 0, start.start.epoch
        quarantine = self.quarantine_path if share.rank == 0 and epoch == 0 else None
        ledger = self._ledger = PipelineCounters(self.max_quarantine, quarantine, start.start.ledger)
        dealt = self._shard("train", start, share, ledger)
        for batch in prefetch(dealt, self.prefetch_batches, lambda item: self._lay_out(*item)):
            if not count and not start.fresh:
                seconds = time.monotonic() - began
                rank_zero_info(f"resumed at epoch {epoch}, {start.start.place}, row {start.rows}, in {seconds:.1f} s")
            count += 1
            yield batch
        ledger.close()
        if count:
            self.steps_per_epoch = count if start.fresh else self.steps_per_epoch
        elif start.fresh:
            raise nothing_to_train(self, share, ledger.counts)
        else:  # resumed on more ranks: the rest of the epoch is no batch for each of them
            self._cursor = start.next_epoch()
            yield from self._epoch(self._cursor, share)

    def _shard(
        self, split: Split, start: Cursor, share: DataShard, ledger: PipelineCounters
    ) -> Iterator[tuple[list[Row], Cursor]]:
        """Opens the reading processes, here and now, and returns the pipeline behind them."""
        made = self._blocks(split, start, ledger, rows_multiple=self.batch_size * share.ranks)
        return shard_batches(made, start, share, batch_size=self.batch_size, limit=self.limit(split))

    def _blocks(self, split: Split, start: Cursor, ledger: PipelineCounters, *, rows_multiple: int) -> Iterator[Block]:
        training = split == "train"
        recipe = self.recipe(self.packing if training else self.val_packing or self.packing, training=training)
        order = epoch_order(self.document_processor.sources, epoch=start.start.epoch, seed=self.seed)
        cache = TokenCache(self.cache_dir, self.document_processor, split) if self.cache_dir else None
        documents = read_documents(
            DocumentStream(self.document_processor, split, order, start.start.place, cache), self.num_workers
        )
        return blocks(documents, recipe, start.start.fresh(), ledger, rows_multiple=rows_multiple, skip=start.rows)

    def limit(self, split: Split) -> int | None:
        """At most so many rows of a split are used, on all ranks together; None is all."""
        return self.val_rows if split == "val" else None

    def _lay_out(self, rows: list[Row], cursor: Cursor | None = None) -> Batch:
        batch = to_batch(rows, self.sequence_length, batch_size=self.batch_size)
        batch.cursor = cursor
        batch.extras = self.extras(rows) if self.extras is not None else None
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return batch.pin_memory() if on_gpu and torch.cuda.is_available() else batch
