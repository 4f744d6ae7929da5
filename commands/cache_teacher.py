"""``python main.py cache-teacher``: write what a frozen teacher predicts, so that ``fit`` needs no teacher in memory.

The examples that the configured run will use, each once and in the order of their first use, are cut into shards of
``--shard_examples``. A shard depends on its own examples alone: made again, or by another process, it has the same
bytes. So a killed command goes on where it was, and N GPUs take every N-th shard, with no message between them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from commands.inspect.command import InspectCLI
from commands.inspect.plan import Plan, model_config
from datamodules.errors import UserError
from datamodules.findings import FindingsDataModule
from datamodules.packing import Packing, Row, pack, to_batch
from datamodules.stream.dedup import HashSet
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.losses.objectives import Distillation
from lightning_modules.losses.teacher import Teacher, check_same_tokenizer
from lightning_modules.losses.teacher_cache import TeacherCache, cache_key, check_key, digest, read_record, student_base
from lightning_modules.losses.teacher_shards import CHUNK, BrokenShard, Shard, id_type, save_shard, summarize
from lightning_modules.models.backbone import out_of_memory_advice
from lightning_modules.models.backend import supervised_positions

if TYPE_CHECKING:
    from collections.abc import Callable

    from datamodules.stream.splits import Split
    from datamodules.tokenization.chat_format import Example

RANK, RANKS = "SYS_SCAN_CACHE_RANK", "SYS_SCAN_CACHE_RANKS"  #: which of how many processes this is


def main(args: list[str]) -> int:
    """Runs ``cache-teacher`` with its options; ``args`` begins with the command's name.

    Raises:
        UserError: the config has no teacher to cache, or the folder holds a cache of something else.
    """
    options, rest = _parse(args[1:])
    if options.devices > 1 and RANK not in os.environ:
        return _on_every_device(args, options.devices)
    rank, ranks = int(os.environ.get(RANK, 0)), int(os.environ.get(RANKS, 1))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli = InspectCLI(rest, run=False)
    CacheWriter.of(cli, options).run(rank, ranks)
    return 0


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="main.py cache-teacher",
        description=__doc__,
        epilog="Every other option is the config's, as in fit: --config configs/distill.yaml, "
        "--model.init_args.objective.init_args.cache.dir=runs/teacher, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs, each with a process of its own")
    parser.add_argument("--shard_examples", type=int, default=1024, metavar="N", help="examples a file (22 MB at k 32)")
    try:
        options, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UserError(f"cache-teacher: {error}") from error
    for name in ("devices", "shard_examples"):
        if getattr(options, name) < 1:
            raise UserError(f"cache-teacher: --{name} {getattr(options, name)} is too small; give a positive number")
    return options, rest


def _on_every_device(args: list[str], devices: int) -> int:
    """Starts a process a GPU and waits for all; the first failure is the command's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(devices)))
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise UserError(f"cache-teacher: --devices {devices}, but there are {torch.cuda.device_count()} GPUs")
    processes = []
    for rank in range(devices):
        environment = os.environ | {RANK: str(rank), RANKS: str(devices)}
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = names[rank]
        program = str(Path(__file__).parents[1] / "main.py")
        command = [sys.executable, program, *args]
        processes.append(subprocess.Popen(command, env=environment))  # noqa: S603 (this program itself)
    try:
        codes = [process.wait() for process in processes]
        return next((code if code > 0 else 128 - code for code in codes if code), 0)  # below 0: killed by a signal
    finally:
        for process in processes:
            process.terminate()


@dataclass
class CacheWriter:
    """Writes a teacher's cache.

    Attributes:
        module: holds the student's recipe.
        objective: names the teacher.
        cache: names the folder.
        data: set up.
        plan: of the run.
        epochs: at most so many are streamed.
        shard_examples: examples a shard.
    """

    module: CausalLMModule
    objective: Distillation
    cache: TeacherCache
    data: FindingsDataModule
    plan: Plan
    epochs: int
    shard_examples: int

    @classmethod
    def of(cls, cli: InspectCLI, options: argparse.Namespace) -> CacheWriter:
        """Reads a config's classes.

        Raises:
            UserError: they are others, or name no teacher or folder.
        """
        module, data = cli.model, cli.datamodule
        if not isinstance(data, FindingsDataModule) or not isinstance(module, CausalLMModule):
            raise UserError("cache-teacher takes configs of FindingsDataModule and CausalLMModule")
        objective = module.objective
        if not isinstance(objective, Distillation) or objective.cache is None or objective.alpha == 0:
            raise UserError(
                "cache-teacher: model.init_args.objective has no teacher to cache; take configs/distill.yaml and set "
                "model.init_args.objective.init_args.cache.dir"
            )
        data.setup("cache-teacher")
        plan = Plan.of(cli.trainer_config, module.optimizer)
        epochs = int(cli.trainer_config.get("max_epochs") or (-1 if plan.max_steps > 0 else 1))
        if epochs < 0 and plan.max_steps < 0:
            raise UserError("trainer.max_steps -1: the run has no end, so how much to cache is not known; set it")
        epochs = epochs if epochs > 0 else sys.maxsize
        return cls(module, objective, objective.cache, data, plan, epochs, options.shard_examples)

    @property
    def rows(self) -> int | None:
        """Rows that the run will train on; None where it ends by epochs."""
        batches = self.plan.max_steps * self.plan.accumulate * self.plan.devices
        return batches * self.data.batch_size if self.plan.max_steps > 0 else None

    @property
    def exhaustive(self) -> bool:
        """Whether one epoch uses every example, so that any further one brings nothing new."""
        return self.data.severity_balance == 0 and all(share >= 1 for share in self.data.task_weights.values() if share)

    def run(self, rank: int = 0, ranks: int = 1) -> None:
        """Writes this process' shards that are not there yet; who finishes last notes that all is done.

        Raises:
            UserError: the folder holds a cache of another key, or there is no example.
        """
        record, folder = self._record(), Path(self.cache.dir)
        _open(folder, record)
        key, found, made = digest(record), _Found(), 0
        with _progress(rank) as show:
            for split in self._splits():
                for number, examples in enumerate(self._shards(split, found, show)):
                    path = folder / f"{split}-{number:05}.safetensors"
                    found.add(path.name, examples)
                    if number % ranks == rank and not _is_there(path, examples, key):
                        save_shard(path, self._targets(examples, record), key)
                        made += 1
        if not found.examples:
            raise UserError(f"data.init_args.sources: {self.data.document_processor.specs} hold no example to cache")
        there = [path for name in found.shards if (path := folder / name).is_file()]
        print(f"cache-teacher: {made} shards written, {len(there)} of {len(found.shards)} there", file=sys.stderr)
        if len(there) == len(found.shards):
            _write(folder / "done.json", found.summary(None if self.exhaustive else self.rows or found.rows))
            for left in folder.glob("*.tmp"):
                left.unlink(missing_ok=True)
            size = sum(path.stat().st_size for path in there)
            print(
                f"cache-teacher: done: {found.examples:,} examples, {found.tokens:,} supervised tokens, "
                f"{size / 2**20:,.1f} MiB, {size / found.examples:,.0f} bytes an example, in {folder}",
                file=sys.stderr,
            )

    def _splits(self) -> list[Split]:
        held_out: list[Split] = ["val", "test"]
        return ["train", *(split for split in held_out if getattr(self.data, f"{split}_fraction"))]

    def _record(self) -> dict[str, Any]:
        """The run's key, and what else shards depend on."""
        student = self.module.backbone
        teacher = student_base(student) if self.objective.teacher == "base" else self.objective.teacher
        check_same_tokenizer(student, teacher)
        sizes = []
        for backbone in (student, teacher):
            config, reason = model_config(backbone)
            if config is None:
                raise UserError(f"cache-teacher: {reason}")
            sizes.append(int(config.get_text_config().vocab_size))
        if self.cache.top_k >= min(sizes):
            raise UserError(
                f"objective.cache.top_k {self.cache.top_k}: the vocabulary has {min(sizes)} tokens; lower it"
            )
        temperatures = sorted({float(self.objective.temperature), *map(float, self.cache.temperatures)})
        key = cache_key(self.data, self.objective.teacher, student, self.cache)
        return {**key, "vocabulary": min(sizes), "temperatures": temperatures}

    @cached_property
    def _teacher(self) -> Teacher:
        """Built when the first shard is missing."""
        student = self.module.backbone
        recipe = student_base(student) if self.objective.teacher == "base" else self.objective.teacher
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Teacher(replace(recipe, lora=None).build(device), recipe)

    def _shards(self, split: Split, found: _Found, show: Callable[..., None]) -> Iterator[list[Example]]:
        """Distinct examples in the order of their first use, so many at a time."""
        waiting: list[Example] = []
        seen = HashSet(None)
        for rows, share in self._blocks(split, found):
            examples = [example for row in rows for example in row.examples]
            new = seen.add(np.array([example.key for example in examples], np.uint64))
            waiting += [example for example, is_new in zip(examples, new, strict=True) if is_new]
            while len(waiting) >= self.shard_examples:
                show(split, found, share)
                yield waiting[: self.shard_examples]
                waiting = waiting[self.shard_examples :]
        if waiting:
            yield waiting
        show(split, found, 1.0)

    def _blocks(self, split: Split, found: _Found) -> Iterator[tuple[list[Row], float | None]]:
        """Rows of the blocks that the run needs, and how much of it they are.

        One block more than it ends in: with other ranks some rows are dealt a block later.
        """
        training = split == "train"
        limit = self.rows if training else self.data.limit(split)
        epochs = self.epochs if training and not self.exhaustive else 1
        dealt = 0
        for epoch in range(epochs):
            for rows, emit in self.data.first_uses(split, epoch, ranks=self.plan.devices):
                yield rows, dealt / limit if limit else None
                if limit is not None and dealt >= limit:
                    return
                dealt += emit
                found.rows += emit if training else 0

    @torch.inference_mode()
    def _targets(self, examples: list[Example], record: dict[str, Any]) -> dict[str, Any]:
        """Runs the teacher over examples and returns a shard's arrays."""
        mode: Packing = "shared_prefix" if self.data.packing == "shared_prefix" else "packed"
        rows = pack(examples, sequence_length=self.data.sequence_length, mode=mode)
        by_key: dict[int, list[Any]] = {}
        for first in range(0, len(rows), self.data.batch_size):
            some = rows[first : first + self.data.batch_size]
            parts = self._predict(some, record)
            start = 0
            for example in (example for row in some for example in row.examples):
                end = start + len(example.completion_ids)
                by_key[example.key] = [part[start:end] for part in parts]
                start = end
        ids, log_probs, tails = (np.concatenate([by_key[e.key][part] for e in examples]) for part in range(3))
        return {
            "keys": np.array([example.key for example in examples], np.uint64),
            "ends": np.cumsum([len(example.completion_ids) for example in examples]),
            "ids": ids, "log_probs": log_probs, "tails": tails,
        }  # fmt: skip

    def _predict(self, rows: list[Row], record: dict[str, Any]) -> list[Any]:
        """``ids``, ``log_probs`` and ``tails`` of rows' supervised positions, on the host."""
        device = self._teacher.decoder.model.device
        batch = to_batch(rows, self.data.sequence_length)
        with out_of_memory_advice(f"data.init_args.sequence_length {self.data.sequence_length} or batch_size"):
            batch = batch.to(device)
            predictions = self._teacher.predict(batch, supervised_positions(batch))
            parts: list[list[Any]] = [[], [], []]
            for hidden_NC in predictions.hidden_NC.split(CHUNK):
                logits_NV = predictions.head(hidden_NC)[:, : record["vocabulary"]]
                for part, tensor in zip(
                    parts, summarize(logits_NV, self.cache.top_k, record["temperatures"]), strict=True
                ):
                    part.append(tensor.cpu().numpy())
        types = (id_type(record["vocabulary"]), np.float16, np.float16)
        return [np.concatenate(part).astype(dtype) for part, dtype in zip(parts, types, strict=True)]


@dataclass
class _Found:
    """What was streamed so far."""

    shards: list[str] = field(default_factory=list)
    rows: int = 0
    examples: int = 0
    findings: int = 0
    tokens: int = 0

    def add(self, name: str, examples: list[Example]) -> None:
        self.shards.append(name)
        self.examples += len(examples)
        self.findings += sum(example.findings for example in examples)
        self.tokens += sum(len(example.completion_ids) for example in examples)

    def summary(self, rows: int | None) -> dict[str, Any]:
        """For ``done.json``; ``rows`` of training are covered, None for any number."""
        return {**asdict(self), "rows": rows}


def _open(folder: Path, record: dict[str, Any]) -> None:
    """Makes a cache's folder, or goes on in one of the same key."""
    stored = read_record(folder / "key.json")
    if stored is not None:
        check_key(stored, record, folder)
        return
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        raise UserError(f"objective.cache.dir {folder}: it has shards but no key.json; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "key.json", record)


def _is_there(path: Path, examples: list[Example], key: str) -> bool:
    """Whether a shard holds these examples, unharmed; says so where one has to be made again."""
    if not path.exists():
        return False
    keys = np.array([example.key for example in examples], np.uint64)
    try:
        shard = Shard(path, key)
        if not shard.is_intact():
            raise BrokenShard(f"{path.name} was changed after it was written")
    except BrokenShard as error:
        print(f"cache-teacher: {error}; it is made again", file=sys.stderr)
        return False
    return np.array_equal(shard.keys, keys)  # a longer run's last shard holds more


def _write(path: Path, record: dict[str, Any]) -> None:
    waiting = path.with_suffix(f".{os.getpid()}.part")
    waiting.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    waiting.replace(path)


@contextmanager
def _progress(rank: int) -> Iterator[Callable[[str, _Found, float | None], None]]:
    """Shows a bar on stderr, of the first process; yields what to call before each shard."""
    columns: tuple[Any, ...] = (
        TextColumn("cache-teacher"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=rank > 0) as bar:
        task = bar.add_task("", total=None, text="")

        def show(split: str, found: _Found, share: float | None) -> None:
            text = f"{split}: {found.examples:,} examples, {len(found.shards)} shards"
            bar.update(task, total=None if share is None else 1.0, completed=min(share or 0.0, 1.0), text=text)

        yield show
