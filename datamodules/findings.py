"""FindingsDataModule: Lightning's data module for findings of the scanner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.findings_stream import FindingsStream
from datamodules.stream.batching import DataShard
from datamodules.stream.prefetch import Restartable
from datamodules.stream.resume import Cursor, check_place, compare_settings
from datamodules.validation import check_options, check_prefixes, check_token_ids

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from datamodules.batch import Batch


class FindingsDataModule(FindingsStream, LightningDataModule):
    """Lightning's hooks and loaders for a :class:`FindingsStream`, which documents the options.

    The position in the training data is a part of Lightning's checkpoints, so a resumed run continues after the last
    batch that a finished step consumed.
    """

    def setup(self, stage: str | None = None) -> None:
        """Opens sources, tasks and tokenizer, and checks the options without reading the data.

        Raises:
            UserError: an option has an unsupported value.
        """
        check_options(
            sequence_length=self.sequence_length, batch_size=self.batch_size, task_weights=self.task_weights,
            severity_balance=self.severity_balance, val_fraction=self.val_fraction, test_fraction=self.test_fraction,
        )  # fmt: skip
        _ = self.document_processor.sources
        check_token_ids(self.chat, self.tasks, self.document_processor.tokenizer)
        check_prefixes(self.chat, self.tasks, self.sequence_length)
        if stage == "fit" and self.trainer is not None and not batches_started(self.trainer):
            self._resume.reset()  # a new run; a checkpoint is loaded after this
            self._is_resumed = self.sources_changed = False

    def teardown(self, stage: str) -> None:
        """Prints at the end of a fit the counters of its last epoch."""
        if stage == "fit" and self._counters.counts:
            rank_zero_info(f"data of the last epoch, as far as it was read: {self._counters.summary()}")

    def train_dataloader(self) -> Restartable[Batch]:
        """Returns the training batches of this rank, from the last consumed batch to the end of the epoch."""
        return Restartable(self._rank_train_batches)

    def val_dataloader(self) -> Restartable[Batch] | list[Any]:
        """Returns the validation batches of this rank, each example once; none if ``val_fraction`` is 0."""
        return Restartable(lambda: self.eval_batches("val", self._rank_shard())) if self.val_fraction else []

    def test_dataloader(self) -> Restartable[Batch] | list[Any]:
        """Returns the test batches of this rank, each example once; none if ``test_fraction`` is 0."""
        return Restartable(lambda: self.eval_batches("test", self._rank_shard())) if self.test_fraction else []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Records a training batch. Lightning calls this right before the step, not when it prefetches."""
        cursor = getattr(batch, "cursor", None)
        if isinstance(cursor, Cursor) and self.trainer is not None and self.trainer.training:
            if self.trainer.ckpt_path is not None and not self._is_resumed:
                self._is_resumed = True
                rank_zero_warn(
                    f"--ckpt_path {self.trainer.ckpt_path}: the checkpoint holds no position in the data; they are "
                    "read from the beginning"
                )
            if cursor.first:
                # a checkpoint of an epoch's last batch is resumed in the next epoch with the old epoch's batch count,
                # which would shift gradient accumulation (Lightning resets it only for loaders of known length)
                self.trainer.fit_loop.epoch_loop.batch_progress.current.reset()
            self._resume.begin_batch(cursor, batches_started(self.trainer) + 1)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last consumed batch; ``torch.load(weights_only=True)`` reads it."""
        finished = None if self.trainer is None else batches_finished(self.trainer)
        return self._resume.state_dict(finished) | {"settings": self.settings(), "sources": self.source_fingerprints()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the position of a checkpoint; workers, ranks and batch size may be others than before.

        Raises:
            UserError: a fit resumes with other held-out data or another order, or with a position beyond the data.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        compare_settings(state_dict["settings"], self.settings(), fitting)
        now = self.source_fingerprints()
        self.sources_changed = state_dict.get("sources", now) != now
        if self.sources_changed:
            rank_zero_warn(
                f"data.init_args.sources={self.document_processor.specs}: names, sizes or times of the files differ "
                "from the checkpoint's; if their records differ too, resuming is not exact"
            )
        self._resume.load_state_dict(state_dict)
        self._is_resumed = True
        if fitting:
            check_place(self._resume.cursor.start, self.document_processor, self.seed)
        if self.trainer is not None:
            restart_data_fetcher(self.trainer)

    def _rank_shard(self) -> DataShard:
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return DataShard(kwargs["rank"], kwargs["num_replicas"]) if kwargs else DataShard()

    def _rank_train_batches(self) -> Iterator[Batch]:
        overfit = self.trainer is not None and getattr(self.trainer, "overfit_batches", False)
        yield from self.train_batches(0 if overfit else None, self._rank_shard())

    def _pins_memory(self) -> bool:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return on_gpu and torch.cuda.is_available()


def batches_started(trainer: Trainer) -> int:
    """Returns the number of training batches whose step began, of this run and of the runs that it resumes."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def batches_finished(trainer: Trainer) -> int:
    """Returns the number of training batches whose step ended, of this run and of the runs that it resumes."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()["processed"])


def restart_data_fetcher(trainer: Trainer) -> None:
    """Lets the fit loop request its first batch again, after the position in the data has changed.

    ``trainer.estimated_stepping_batches`` opens the loader, and fetches a batch, before the checkpoint is loaded. The
    fetcher has no public name in Lightning 2.
    """
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)
