"""A teacher's predictions that are read from disk: no teacher in memory, no forward pass of it.

``python main.py cache-teacher`` writes a folder of shards (:mod:`lightning_modules.losses.teacher_shards`),
``key.json`` (the settings that the targets depend on) and, once it is complete, ``done.json`` (its size). A run with
another key is refused with the settings that differ. Targets are found by the key of an example, so neither packing
nor the number of ranks matters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from datamodules.batch import IGNORE_INDEX
from datamodules.errors import UserError
from datamodules.findings import FindingsDataModule
from datamodules.pretrained.locate import resolve
from datamodules.tokenization.chat_template import template_source
from lightning_modules.losses.teacher_shards import BrokenShard, Shard, Targets
from lightning_modules.models.backbone import RANDOM, Backbone

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.batch import Batch
    from datamodules.packing import Row

VERSION = 1  #: of the file layout; a change invalidates old caches
SAMPLED = 1 << 20  #: bytes at the start and at the end of a file of weights that enter its digest
MULTIPLE = 256  #: positions of a batch are rounded up to it
ABSENT = "absent"  #: replaces a digest where this machine does not have the teacher, which it does not need
FIX = "Fix: run `python main.py cache-teacher` with this config, into a folder of its own"


@dataclass(frozen=True)
class TeacherCache:
    """Folder and contents of a cache of a teacher's predictions."""

    dir: str
    """Folder: ``python main.py cache-teacher`` writes it, ``fit`` reads it."""
    top_k: int = 32
    """Number of most probable tokens kept per position; the other tokens are one bucket."""
    temperatures: tuple[float, ...] = ()
    """Temperatures in addition to the objective's whose tails are kept, so one cache is enough for several runs."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"objective.cache.top_k {self.top_k} is not positive; 32 is usual")
        if any(t <= 0 for t in self.temperatures):
            raise ValueError(f"objective.cache.temperatures {list(self.temperatures)}: one is not positive")


class CachedTeacher:
    """A cache that is opened for a run.

    Args:
        cache: names the folder.
        key: of the run (:func:`cache_key`).
        temperature: of the objective.

    Attributes:
        done: contents of ``done.json``: ``rows`` of training that are covered, and ``shards``.
        k: tokens kept per position.
        vocabulary: number of tokens of the teacher.

    Raises:
        UserError: there is no finished cache, its key differs, it lacks the temperature, or a shard is broken.
    """

    def __init__(self, cache: TeacherCache, key: dict[str, Any], temperature: float) -> None:
        folder = Path(cache.dir)
        stored = read_record(folder / "key.json")
        if stored is None:
            raise UserError(f"objective.cache.dir {folder}: no teacher's cache there. {FIX}")
        check_key(stored, key, folder)
        if temperature not in stored["temperatures"]:
            known = ", ".join(f"{t:g}" for t in stored["temperatures"])
            raise UserError(f"objective.temperature {temperature:g}: the cache {folder} has {known}. {FIX}")
        self.done = read_record(folder / "done.json") or {}
        if not self.done:
            raise UserError(f"objective.cache.dir {folder}: not finished; run `python main.py cache-teacher` again")
        self.k, self.vocabulary = int(stored["top_k"]), int(stored["vocabulary"])
        self._column = stored["temperatures"].index(temperature)
        self._folder = folder
        try:
            self._shards = [Shard(folder / name, digest(stored)) for name in self.done["shards"]]
        except BrokenShard as error:
            raise UserError(f"objective.cache.dir {folder}: {error}. Fix: run cache-teacher again") from error
        keys = [shard.keys for shard in self._shards]
        flat = np.concatenate(keys) if keys else np.empty(0, np.uint64)
        self._order = np.argsort(flat, kind="stable")
        self._sorted = flat[self._order]
        self._starts = np.cumsum([0, *map(len, keys)])

    def check_length(self, rows: int) -> None:
        """Refuses a run that needs more rows than were cached.

        Args:
            rows: of training that the run reads.

        Raises:
            UserError: the run would stop at an example without targets.
        """
        if self.done["rows"] is not None and rows > self.done["rows"]:
            raise UserError(
                f"objective.cache.dir {self._folder}: it covers {self.done['rows']:,} rows of training and the run "
                f"takes {rows:,}. Fix: run `python main.py cache-teacher` again with this config; it extends the cache"
            )

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Reads the targets of rows, in the order of their labels; :func:`targets_of` unpacks them on the device.

        The number of positions is rounded up to a multiple of 256, so that there are few shapes.

        Raises:
            UserError: an example is not in the cache.
        """
        targets = [self._read(example.key, len(example.completion_ids)) for row in rows for example in row.examples]
        tokens = sum(len(parts[0]) for parts in targets)
        size = (tokens // MULTIPLE + 1) * MULTIPLE  # never 0: positions without a label need an entry to point to
        ids, kept = np.zeros((size, self.k), np.int32), np.zeros((size, self.k), np.float16)
        tail, start = np.zeros(size, np.float16), 0
        for example_ids, example_kept, tails in targets:
            span = slice(start, start := start + len(example_ids))
            ids[span], kept[span], tail[span] = example_ids, example_kept, tails[:, self._column]
        return {
            "teacher_ids": torch.from_numpy(ids),
            "teacher_log_probs": torch.from_numpy(kept),
            "teacher_tail": torch.from_numpy(tail),
        }

    def _read(self, key: int, tokens: int) -> list[Any]:
        at = int(np.searchsorted(self._sorted, np.uint64(key)))
        if at == len(self._sorted) or self._sorted[at] != np.uint64(key):
            raise UserError(f"objective.cache.dir {self._folder}: an example is not in it. {FIX}")
        index = int(self._order[at])
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        parts = self._shards[shard].read(index - int(self._starts[shard]))
        if len(parts[0]) != tokens:
            raise UserError(
                f"objective.cache.dir {self._folder}: an example has {len(parts[0])} positions there and {tokens} "
                f"here. {FIX}"
            )
        return parts


def targets_of(batch: Batch, labels_N: Tensor, vocabulary: int | None) -> Targets | None:
    """Unpacks the targets that :class:`CachedTeacher` put into a batch.

    Args:
        batch: on the device.
        labels_N: labels of the predicted positions, in the order of the rows; a position without a label gets an
            arbitrary target.
        vocabulary: of the cache.

    Returns:
        The targets; None if the batch has none.
    """
    if not batch.extras or "teacher_ids" not in batch.extras:
        return None
    index_N = ((labels_N != IGNORE_INDEX).cumsum(0) - 1).clamp(min=0)
    ids_NK, kept_NK, tail_N = (batch.extras[f"teacher_{name}"][index_N] for name in ("ids", "log_probs", "tail"))
    return Targets(ids_NK.long(), kept_NK, tail_N, vocabulary)


def cache_key(
    data: FindingsDataModule, teacher: Backbone | Literal["base"], student: Backbone, cache: TeacherCache
) -> dict[str, Any]:
    """Returns the settings that the targets of a cache depend on, in parts that a person can compare.

    Args:
        data: the data module, after its ``setup``.
        teacher: of the objective.
        student: the model whose base may be the teacher.
        cache: its ``top_k`` is a part.
    """
    tokenizer = data.chat.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return {
        "version": VERSION,
        "tokenizer": digest(state),
        "template": digest(template_source(tokenizer)),
        "data": {
            "sources": [source.fingerprint() for source in data.document_processor.sources],
            "instructions": {name: digest(data.chat.prefix_ids(task)) for name, task in sorted(data.tasks.items())},
            **data.settings(),
        },
        "teacher": _teacher_key(student_base(student) if teacher == "base" else teacher),
        "top_k": cache.top_k,
    }


def check_key(stored: dict[str, Any], key: dict[str, Any], folder: Path) -> None:
    """Compares two keys part by part.

    Raises:
        UserError: they differ; the message names up to four parts that do.
    """
    differing = list(_differences(stored, json.loads(json.dumps(key))))
    if differing:
        raise UserError(f"objective.cache.dir {folder} was made for something else: {'; '.join(differing[:4])}. {FIX}")


def _differences(stored: dict[str, Any], key: dict[str, Any], prefix: str = "") -> Any:
    for name, value in key.items():
        other = stored.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            gone = dict.fromkeys(n for n in other if n not in value)
            yield from _differences(other, value | gone, f"{prefix}{name}.")
        elif other != value and ABSENT not in (value, other):
            yield f"{prefix}{name} was {other}, is {value}"


def student_base(student: Backbone) -> Backbone:
    """Returns a student's backbone without its adapter."""
    return replace(student, lora=None, adapter=None)


def _teacher_key(teacher: Backbone) -> dict[str, Any]:
    try:
        location = resolve(teacher.model_name_or_path.removeprefix(RANDOM), weights=False)
    except UserError:
        location = ABSENT
    local = location == ABSENT or Path(location).is_dir()
    return {
        "weights": _weights_digest(Path(location)) if local else location,
        "revision": None if local else teacher.revision,
        "quantization": teacher.quantization,
        "dtype": teacher.dtype,
        "fp8": teacher.fp8,
        "adapter": None if teacher.adapter is None else _weights_digest(Path(teacher.adapter)),
    }


def _weights_digest(folder: Path) -> str:
    """Computes a digest of a folder's config and of the sizes, beginnings and ends of its weights."""
    if not folder.is_dir():
        return ABSENT
    state = blake2b(digest_size=16)
    for file in sorted(
        [*folder.glob("config.json"), *folder.glob("adapter_config.json"), *folder.glob("*.safetensors")]
    ):
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            state.update(f"{file.name} {size}".encode())
            for start in (0, max(size - SAMPLED, 0)):
                opened.seek(start)
                state.update(opened.read(SAMPLED))
    return state.hexdigest()


def digest(value: Any) -> str:
    """Computes a digest of plain data."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_record(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; returns None if the file is missing or holds something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
