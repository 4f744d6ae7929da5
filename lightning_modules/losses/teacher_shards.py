"""What a teacher predicts at supervised positions, kept on disk: the format of a shard.

Shapes in names: E examples, N supervised tokens, K kept tokens a position, M temperatures, V vocabulary.

A shard is one safetensors file, so that a piece of it is read without the rest:

- ``keys`` uint64 [E], the examples' own; ``ends`` int64 [E], behind the last of each one's positions;
- ``ids`` uint16 or int32 [N, K], the teacher's most probable tokens, and ``log_probs`` float16 [N, K] at temperature 1;
- ``tails`` float16 [N, M], the log of the sum of ``p ** (1 / T)`` over all other tokens, for each kept temperature T.

So the softmax at T over the K tokens and one bucket for the rest is known exactly, but for float16's rounding. A
position takes ``4 K + 2 M`` bytes with a vocabulary of up to 65,536 tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NAMES = ("keys", "ends", "ids", "log_probs", "tails")
EXAMPLE_BYTES = 16  #: of an example's key and end
CHUNK = 1024  #: positions whose logits exist at a time


class BrokenShard(Exception):
    """A shard's file is cut off, changed, or of another cache; the message says which."""


@dataclass(frozen=True)
class Targets:
    """A teacher's most probable tokens at some positions; see the module's docstring.

    Attributes:
        ids_NK: int64.
        log_probs_NK: at temperature 1.
        tail_N: log of the rest's sum at the objective's temperature.
        vocabulary: tokens that the teacher tells apart; None for the student's.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_N: Tensor
    vocabulary: int | None = None


def position_bytes(k: int, temperatures: int, vocabulary: int) -> int:
    """Bytes that one supervised position takes on disk."""
    return k * (np.dtype(id_type(vocabulary)).itemsize + 2) + 2 * temperatures


def id_type(vocabulary: int) -> type[np.generic]:
    """The smallest type of token ids."""
    return np.uint16 if vocabulary <= 1 << 16 else np.int32


def summarize(logits_NV: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the most probable tokens and the mass of the rest.

    Args:
        logits_NV: of the teacher.
        k: K, below V.
        temperatures: whose tails are kept.

    Returns:
        ``ids`` int64 [N, K] from the most probable on, ``log_probs`` [N, K], ``tails`` [N, M].
    """
    log_probs_NV = logits_NV.log_softmax(dim=-1)
    top, ids_NK = log_probs_NV.topk(k, dim=-1)
    rest_NV = log_probs_NV.scatter(1, ids_NK, -torch.inf)
    tails = torch.stack([(rest_NV / t).logsumexp(dim=-1) for t in temperatures], dim=-1)
    lowest = torch.finfo(torch.float16).min  # a rest of nothing: 0 x -inf would be no number
    return ids_NK, top.clamp(min=lowest), tails.clamp(min=lowest)


def save_shard(path: Path, arrays: dict[str, NDArray[np.generic]], key: str) -> None:
    """Writes a shard under another name and renames it, so that it is there whole or not at all.

    Args:
        path: of the file.
        arrays: by the names of :data:`NAMES`.
        key: digest of the cache's key.
    """
    from safetensors.numpy import save

    waiting = path.with_suffix(f".{os.getpid()}.part")
    record = json.dumps({"key": key, "digest": _digest(arrays)}, sort_keys=True)
    content = save({name: np.ascontiguousarray(arrays[name]) for name in NAMES}, {"shard": record})
    with waiting.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    waiting.replace(path)


class Shard:
    """An opened shard, whose positions are read when asked for.

    Args:
        path: of the file.
        key: digest of the cache's key.

    Raises:
        BrokenShard: the file is cut off, or belongs to another cache.
    """

    def __init__(self, path: Path, key: str) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="numpy")
            self._record = json.loads((self._file.metadata() or {})["shard"])
            self.keys: NDArray[np.uint64] = self._file.get_tensor("keys")
            self.ends: NDArray[np.int64] = self._file.get_tensor("ends")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BrokenShard(f"{path.name} can't be read ({' '.join(str(error).split())[:120]})") from error
        if self._record["key"] != key:
            raise BrokenShard(f"{path.name} belongs to another cache")
        self._slices = [self._file.get_slice(name) for name in ("ids", "log_probs", "tails")]

    def read(self, index: int) -> list[NDArray[np.generic]]:
        """``ids``, ``log_probs`` and ``tails`` of one of its examples."""
        start = int(self.ends[index - 1]) if index else 0
        return [part[start : int(self.ends[index])] for part in self._slices]

    def whole(self) -> bool:
        """Whether every byte is what was written."""
        digest: bool = self._record["digest"] == _digest({name: self._file.get_tensor(name) for name in NAMES})
        return digest


def _digest(arrays: dict[str, NDArray[np.generic]]) -> str:
    state = blake2b(digest_size=16)
    for name in NAMES:
        state.update(np.ascontiguousarray(arrays[name]).data)
    return state.hexdigest()
