"""A teacher's predictions read from disk instead of computed: no teacher in memory, no forward pass.

``python main.py cache-teacher`` writes a folder of shards (:mod:`lightning_modules.losses.teacher_shards`),
``key.json`` (what
the targets depend on) and, when all is there, ``done.json`` (how much it is). A run whose key differs is refused, and
told in which part. Targets are found by an example's own key, so that neither packing nor ranks matter.
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

VERSION = 1  #: of the layout; a change makes old caches unused
SAMPLED = 1 << 20  #: bytes at the start and at the end of a file of weights that its digest is over
MULTIPLE = 256  #: positions of a batch are rounded up to it
ABSENT = "absent"  #: in place of a digest: this machine does not have the teacher, and need not
WAY_OUT = "run `python main.py cache-teacher` with this config, into a folder of its own"


@dataclass(frozen=True)
class TeacherCache:
    """Where a teacher's predictions are kept, and how much of them."""

    dir: str
    """Written by ``python main.py cache-teacher``, read by ``fit``."""
    top_k: int = 32
    """Most probable tokens kept a position; the others are one bucket."""
    temperatures: tuple[float, ...] = ()
    """Temperatures beside the objective's whose tails are kept too, so that one cache serves several runs."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"objective.cache.top_k {self.top_k} is not positive; 32 is usual")
        if any(t <= 0 for t in self.temperatures):
            raise ValueError(f"objective.cache.temperatures {list(self.temperatures)}: one is not positive")


class CachedTeacher:
    """Opens a cache for a run.

    Args:
        recipe: names the folder.
        key: of the run (:func:`cache_key`).
        temperature: of the objective.

    Raises:
        UserError: there is no finished cache, its key differs, it lacks the temperature, or a shard is broken.
    """

    def __init__(self, recipe: TeacherCache, key: dict[str, Any], temperature: float) -> None:
        folder = Path(recipe.dir)
        stored = read_record(folder / "key.json")
        if stored is None:
            raise UserError(f"objective.cache.dir {folder}: no teacher's cache there; {WAY_OUT}")
        check_key(stored, key, folder)
        if temperature not in stored["temperatures"]:
            known = ", ".join(f"{t:g}" for t in stored["temperatures"])
            raise UserError(f"objective.temperature {temperature:g}: the cache {folder} has {known}; {WAY_OUT}")
        self.done = read_record(folder / "done.json") or {}
        if not self.done:
            raise UserError(f"objective.cache.dir {folder}: not finished; run `python main.py cache-teacher` again")
        self.k, self.vocabulary = int(stored["top_k"]), int(stored["vocabulary"])
        self._column = stored["temperatures"].index(temperature)
        self._folder = folder
        try:
            self._shards = [Shard(folder / name, digest(stored)) for name in self.done["shards"]]
        except BrokenShard as error:
            raise UserError(f"objective.cache.dir {folder}: {error}; cache-teacher makes it again") from error
        keys = [shard.keys for shard in self._shards]
        flat = np.concatenate(keys) if keys else np.empty(0, np.uint64)
        self._order = np.argsort(flat, kind="stable")
        self._sorted = flat[self._order]
        self._starts = np.cumsum([0, *map(len, keys)])

    def check_length(self, rows: int) -> None:
        """Refuses a run that needs more rows than were cached.

        Raises:
            UserError: it would end at an example without targets.
        """
        if self.done["rows"] is not None and rows > self.done["rows"]:
            raise UserError(
                f"objective.cache.dir {self._folder}: it covers {self.done['rows']:,} rows of training and the run "
                f"takes {rows:,}; run `python main.py cache-teacher` again with this config, it goes on there"
            )

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Reads the targets of rows, in the order of their labels; :func:`targets_of` unpacks them on the device.

        Half-precision numbers travel as int16: a trainer in bf16 would round them. The number of positions is rounded
        up, so that there are few shapes.

        Raises:
            UserError: an example is not in the cache.
        """
        found = [self._read(example.key, len(example.completion_ids)) for row in rows for example in row.examples]
        tokens = sum(len(parts[0]) for parts in found)
        size = (tokens // MULTIPLE + 1) * MULTIPLE  # never none: labels that are not there have to point somewhere
        ids, kept = np.zeros((size, self.k), np.int32), np.zeros((size, self.k), np.float16)
        tail, start = np.zeros(size, np.float16), 0
        for some_ids, some_kept, tails in found:
            here = slice(start, start := start + len(some_ids))
            ids[here], kept[here], tail[here] = some_ids, some_kept, tails[:, self._column]
        return {
            "teacher_ids": torch.from_numpy(ids),
            "teacher_log_probs": torch.from_numpy(kept.view(np.int16)),
            "teacher_tail": torch.from_numpy(tail.view(np.int16)),
        }

    def _read(self, key: int, tokens: int) -> list[Any]:
        at = int(np.searchsorted(self._sorted, np.uint64(key)))
        if at == len(self._sorted) or self._sorted[at] != np.uint64(key):
            raise UserError(f"objective.cache.dir {self._folder}: an example is not in it; {WAY_OUT}")
        index = int(self._order[at])
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        parts = self._shards[shard].read(index - int(self._starts[shard]))
        if len(parts[0]) != tokens:
            raise UserError(
                f"objective.cache.dir {self._folder}: an example has {len(parts[0])} positions there and {tokens} "
                f"here; {WAY_OUT}"
            )
        return parts


def targets_of(batch: Batch, labels_N: Tensor, vocabulary: int | None) -> Targets | None:
    """Unpacks what :class:`CachedTeacher` put into a batch; None where there is nothing.

    Args:
        batch: on the device.
        labels_N: of the positions that are predicted, in the rows' order; those without a label get any target.
        vocabulary: of the cache.
    """
    if not batch.extras or "teacher_ids" not in batch.extras:
        return None
    index_N = ((labels_N != IGNORE_INDEX).cumsum(0) - 1).clamp(min=0)
    ids_NK, kept_NK, tail_N = (batch.extras[f"teacher_{name}"][index_N] for name in ("ids", "log_probs", "tail"))
    return Targets(ids_NK.long(), kept_NK.view(torch.float16), tail_N.view(torch.float16), vocabulary)


def cache_key(
    data: FindingsDataModule, teacher: Backbone | Literal["base"], student: Backbone, cache: TeacherCache
) -> dict[str, Any]:
    """What a cache's targets depend on, in parts that a person can compare.

    Args:
        data: set up.
        teacher: of the objective.
        student: whose base it may be.
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
        UserError: they differ; it says in what.
    """
    differing = list(_differences(stored, json.loads(json.dumps(key))))
    if differing:
        raise UserError(
            f"objective.cache.dir {folder} was made for something else: {'; '.join(differing[:4])}; {WAY_OUT}"
        )


def _differences(stored: dict[str, Any], key: dict[str, Any], prefix: str = "") -> Any:
    for name, value in key.items():
        other = stored.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            gone = dict.fromkeys(n for n in other if n not in value)
            yield from _differences(other, value | gone, f"{prefix}{name}.")
        elif other != value and ABSENT not in (value, other):
            yield f"{prefix}{name} was {other}, is {value}"


def student_base(student: Backbone) -> Backbone:
    """The recipe of a student without its adapter."""
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
    """Digest of a folder's config and of the sizes, beginnings and ends of its weights."""
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
    """Digest of plain data."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_record(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; None where there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
