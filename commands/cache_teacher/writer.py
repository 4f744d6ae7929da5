"""Writes the shards of a teacher's cache, and the records of the key and of completeness."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from commands.cache_teacher.predictions import TeacherPredictions
from commands.inspect.plan import Plan, model_config
from datamodules.errors import UserError
from datamodules.files import atomic_write
from datamodules.findings import FindingsDataModule
from datamodules.stream.dedup import HashSet
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.losses.objectives import Distillation
from lightning_modules.losses.teacher import check_same_tokenizer
from lightning_modules.losses.teacher_cache import TeacherCache, cache_key, check_key, digest, read_record, student_base
from lightning_modules.losses.teacher_shards import BrokenShard, Shard, save_shard

if TYPE_CHECKING:
    from collections.abc import Callable

    from commands.config_only_cli import ConfigOnlyCLI
    from datamodules.packing import Row
    from datamodules.stream.splits import Split
    from datamodules.tokenization.chat_format import Example
    from lightning_modules.models.backbone import Backbone

#: temporary files that a killed process leaves; only those of shards, because another process may write a record
TEMPORARY = ("*.safetensors.*.tmp", "*.part")


@dataclass
class CacheWriter:
    """Writes a teacher's cache.

    Attributes:
        module: the student.
        objective: has the teacher.
        cache: has the folder.
        data: the data, after ``setup``.
        plan: the part of the run's settings that decides which examples it uses.
        epochs: largest number of epochs.
        shard_examples: examples per shard.
    """

    module: CausalLMModule
    objective: Distillation
    cache: TeacherCache
    data: FindingsDataModule
    plan: Plan
    epochs: int
    shard_examples: int

    @classmethod
    def from_config(cls, cli: ConfigOnlyCLI, shard_examples: int) -> CacheWriter:
        """Builds a writer for a config.

        Args:
            cli: has the model, the data and the trainer's settings.
            shard_examples: examples per shard.

        Raises:
            UserError: the config has other classes than this project's, or no teacher, or no folder, or no end.
        """
        module, data = cli.model, cli.datamodule
        if not isinstance(data, FindingsDataModule) or not isinstance(module, CausalLMModule):
            raise UserError("cache-teacher: unknown classes. Fix: use FindingsDataModule and CausalLMModule.")
        objective = module.objective
        if not isinstance(objective, Distillation) or objective.cache is None or objective.alpha == 0:
            raise UserError(
                "cache-teacher: model.init_args.objective has no teacher to cache. Fix: use configs/distill.yaml and "
                "set model.init_args.objective.init_args.cache.dir."
            )
        data.setup("cache-teacher")
        plan = Plan.of(cli.trainer_config, module.optimizer)
        epochs = int(cli.trainer_config.get("max_epochs") or (-1 if plan.max_steps > 0 else 1))
        if epochs < 0 and plan.max_steps < 0:
            raise UserError(
                "trainer.max_steps -1: a run without an end has no known number of examples. Fix: set max_steps."
            )
        epochs = epochs if epochs > 0 else sys.maxsize
        return cls(module, objective, objective.cache, data, plan, epochs, shard_examples)

    @property
    def rows(self) -> int | None:
        """Number of rows that the run trains on; None if the run ends by epochs."""
        batches = self.plan.max_steps * self.plan.accumulate * self.plan.devices
        return batches * self.data.batch_size if self.plan.max_steps > 0 else None

    @property
    def exhaustive(self) -> bool:
        """Whether one epoch uses every example, so that further epochs have no new ones."""
        return self.data.severity_balance == 0 and all(share >= 1 for share in self.data.task_weights.values() if share)

    @property
    def teacher(self) -> Backbone:
        """The teacher: the student's base, or a model of its own."""
        return student_base(self.module.backbone) if self.objective.teacher == "base" else self.objective.teacher

    def run(self, rank: int = 0, ranks: int = 1) -> None:
        """Writes the missing shards of this process; the process that finishes last writes ``done.json``.

        Args:
            rank: number of this process.
            ranks: number of processes; each one writes every ``ranks``-th shard.

        Raises:
            UserError: the folder has a cache with another key, or there is no example.
        """
        record, folder = self._record(), Path(self.cache.dir)
        _open(folder, record)
        predictions = TeacherPredictions(
            self.teacher, self.data, self.cache.top_k, record["temperatures"], record["vocabulary"]
        )
        key, streamed, written = digest(record), StreamedExamples(), 0
        with _progress(rank) as show:
            for split in self._splits():
                for number, examples in enumerate(self._shards(split, streamed, show)):
                    path = folder / f"{split}-{number:05}.safetensors"
                    streamed.add(path.name, examples)
                    if number % ranks == rank and not _exists(path, examples, key):
                        save_shard(path, predictions(examples), key)
                        written += 1
        if not streamed.examples:
            specs = self.data.document_processor.specs
            raise UserError(f"data.init_args.sources {specs}: no example to cache. Fix: give sources with findings.")
        self._finish(folder, streamed, written)

    def _finish(self, folder: Path, streamed: StreamedExamples, written: int) -> None:
        existing = [path for name in streamed.shards if (path := folder / name).is_file()]
        count = f"{len(existing)} of {len(streamed.shards)} exist"
        print(f"cache-teacher: {written} shards written, {count}", file=sys.stderr)
        if len(existing) < len(streamed.shards):
            return
        _write(folder / "done.json", streamed.summary(None if self.exhaustive else self.rows or streamed.rows))
        for path in (path for pattern in TEMPORARY for path in folder.glob(pattern)):
            path.unlink(missing_ok=True)
        size = sum(path.stat().st_size for path in existing)
        print(
            f"cache-teacher: done: {streamed.examples:,} examples, {streamed.tokens:,} supervised tokens, "
            f"{size / 2**20:,.1f} MiB, {size / streamed.examples:,.0f} bytes per example, in {folder}",
            file=sys.stderr,
        )

    def _splits(self) -> list[Split]:
        held_out: list[Split] = ["val", "test"]
        return ["train", *(split for split in held_out if getattr(self.data, f"{split}_fraction"))]

    def _record(self) -> dict[str, Any]:
        """Returns the run's key, and the other settings that the shards depend on."""
        student, teacher = self.module.backbone, self.teacher
        check_same_tokenizer(student, teacher)
        sizes = []
        for backbone in (student, teacher):
            config, reason = model_config(backbone)
            if config is None:
                raise UserError(f"cache-teacher: {reason}")
            sizes.append(int(config.get_text_config().vocab_size))
        if self.cache.top_k >= min(sizes):
            raise UserError(
                f"objective.cache.top_k {self.cache.top_k}: the vocabulary has {min(sizes)} tokens. Fix: lower top_k."
            )
        temperatures = sorted({float(self.objective.temperature), *map(float, self.cache.temperatures)})
        key = cache_key(self.data, self.objective.teacher, student, self.cache)
        return {**key, "vocabulary": min(sizes), "temperatures": temperatures}

    def _shards(self, split: Split, streamed: StreamedExamples, show: Callable[..., None]) -> Iterator[list[Example]]:
        """Yields the distinct examples in the order of their first use, ``shard_examples`` at a time."""
        pending: list[Example] = []
        seen = HashSet(None)
        for rows, share in self._blocks(split, streamed):
            examples = [example for row in rows for example in row.examples]
            is_new = seen.add(np.array([example.key for example in examples], np.uint64))
            pending += [example for example, new in zip(examples, is_new, strict=True) if new]
            while len(pending) >= self.shard_examples:
                show(split, streamed, share)
                yield pending[: self.shard_examples]
                pending = pending[self.shard_examples :]
        if pending:
            yield pending
        show(split, streamed, 1.0)

    def _blocks(self, split: Split, streamed: StreamedExamples) -> Iterator[tuple[list[Row], float | None]]:
        """Yields the rows of the blocks that the run uses, and the part of the run before each block.

        One block more than the run needs is yielded: with another number of ranks some rows are used a block later.
        """
        training = split == "train"
        limit = self.rows if training else self.data.max_rows(split)
        epochs = self.epochs if training and not self.exhaustive else 1
        used = 0
        for epoch in range(epochs):
            for rows, emit in self.data.read_rows(split, epoch, ranks=self.plan.devices):
                yield rows, used / limit if limit else None
                if limit is not None and used >= limit:
                    return
                used += emit
                streamed.rows += emit if training else 0


@dataclass
class StreamedExamples:
    """Counts of the examples that were read so far, in the format of ``done.json``.

    Attributes:
        shards: file names of the shards.
        rows: training rows.
        examples: distinct examples.
        findings: findings of the examples.
        tokens: supervised tokens of the examples.
    """

    shards: list[str] = field(default_factory=list)
    rows: int = 0
    examples: int = 0
    findings: int = 0
    tokens: int = 0

    def add(self, name: str, examples: list[Example]) -> None:
        """Adds a shard.

        Args:
            name: file name.
            examples: examples of the shard.
        """
        self.shards.append(name)
        self.examples += len(examples)
        self.findings += sum(example.findings for example in examples)
        self.tokens += sum(len(example.completion_ids) for example in examples)

    def summary(self, rows: int | None) -> dict[str, Any]:
        """Returns the content of ``done.json``.

        Args:
            rows: number of training rows that the cache covers; None for any number.
        """
        return {**asdict(self), "rows": rows}


def _open(folder: Path, record: dict[str, Any]) -> None:
    """Creates the folder of a cache, or checks that an existing one has the same key."""
    stored = read_record(folder / "key.json")
    if stored is not None:
        check_key(stored, record, folder)
        return
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        raise UserError(f"objective.cache.dir {folder}: it has shards but no key.json. Fix: give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "key.json", record)


def _exists(path: Path, examples: list[Example], key: str) -> bool:
    """Returns whether a complete and unchanged shard of these examples exists; prints why a shard is written again."""
    if not path.exists():
        return False
    keys = np.array([example.key for example in examples], np.uint64)
    try:
        shard = Shard(path, key)
        if not shard.is_intact():
            raise BrokenShard(f"{path.name} was changed after it was written")
    except BrokenShard as error:
        print(f"cache-teacher: {error}; writing it again", file=sys.stderr)
        return False
    return np.array_equal(shard.keys, keys)  # the last shard of a longer run has more examples


def _write(path: Path, record: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


@contextmanager
def _progress(rank: int) -> Iterator[Callable[[str, StreamedExamples, float | None], None]]:
    """Shows a progress bar on stderr in the first process; yields a function to call before each shard."""
    columns: tuple[Any, ...] = (
        TextColumn("cache-teacher"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=rank > 0) as bar:
        task = bar.add_task("", total=None, text="")

        def show(split: str, streamed: StreamedExamples, share: float | None) -> None:
            text = f"{split}: {streamed.examples:,} examples, {len(streamed.shards)} shards"
            bar.update(task, total=None if share is None else 1.0, completed=min(share or 0.0, 1.0), text=text)

        yield show
