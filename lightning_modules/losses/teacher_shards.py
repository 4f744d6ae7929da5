"""The file format of a teacher's predictions at supervised positions.

Shapes in names: E examples, N supervised tokens, K kept tokens per position, M temperatures, V vocabulary.

A shard is one safetensors file, so parts of it can be read without the rest:

- ``keys`` uint64 [E], the keys of the examples; ``ends`` int64 [E], the index after the last position of each example;
- ``ids`` uint16 or int32 [N, K], the teacher's most probable tokens, and ``log_probs`` float16 [N, K] at temperature 1;
- ``tails`` float16 [N, M], the log of the sum of ``p ** (1 / T)`` over all other tokens, for each kept temperature T.

The softmax at T over the K tokens and one bucket for the rest is therefore exact up to the rounding of float16. A
position takes ``4 K + 2 M`` bytes with a vocabulary of up to 65,536 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.errors import one_line
from datamodules.files import atomic_write

NAMES = ("keys", "ends", "ids", "log_probs", "tails")
EXAMPLE_BYTES = 16  #: bytes of an example's key and end
CHUNK = 1024  #: positions whose logits are in memory at the same time


class BrokenShard(Exception):
    """The file of a shard is truncated, changed, or belongs to another cache; the message names the problem."""


@dataclass(frozen=True)
class Targets:
    """A teacher's most probable tokens at N positions; see the module's docstring.

    Attributes:
        ids_NK: int64.
        log_probs_NK: their log-probabilities at temperature 1.
        tail_N: log of the sum over all other tokens at the objective's temperature.
        vocabulary: number of tokens of the teacher; None for that of the student.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_N: Tensor
    vocabulary: int | None = None


def position_bytes(k: int, temperatures: int, vocabulary: int) -> int:
    """Returns the number of bytes of one supervised position on disk.

    Args:
        k: K.
        temperatures: M.
        vocabulary: V.
    """
    return k * (np.dtype(id_type(vocabulary)).itemsize + 2) + 2 * temperatures


def id_type(vocabulary: int) -> type[np.generic]:
    """Returns the smallest type that holds the token ids of a vocabulary."""
    return np.uint16 if vocabulary <= 1 << 16 else np.int32


def summarize(logits_NV: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Reduces logits to the most probable tokens and the mass of the rest.

    Args:
        logits_NV: of the teacher.
        k: K, less than V.
        temperatures: the temperatures of the tails.

    Returns:
        ``ids`` int64 [N, K] in descending order of probability, ``log_probs`` [N, K], ``tails`` [N, M].
    """
    log_probs_NV = logits_NV.log_softmax(dim=-1)
    top, ids_NK = log_probs_NV.topk(k, dim=-1)
    rest_NV = log_probs_NV.scatter(1, ids_NK, -torch.inf)
    tails = torch.stack([(rest_NV / t).logsumexp(dim=-1) for t in temperatures], dim=-1)
    lowest = torch.finfo(torch.float16).min  # the mass of the rest may be 0, and 0 x -inf is NaN
    return ids_NK, top.clamp(min=lowest), tails.clamp(min=lowest)


def save_shard(path: Path, arrays: dict[str, NDArray[np.generic]], key: str) -> None:
    """Writes a shard; its file is complete whenever it exists.

    Args:
        path: of the file.
        arrays: by the names of :data:`NAMES`.
        key: digest of the cache's key.
    """
    from safetensors.numpy import save

    record = json.dumps({"key": key, "digest": _digest(arrays)}, sort_keys=True)
    atomic_write(path, save({name: np.ascontiguousarray(arrays[name]) for name in NAMES}, {"shard": record}))


class Shard:
    """An open shard, whose positions are read on demand.

    Args:
        path: of the file.
        key: digest of the cache's key.

    Raises:
        BrokenShard: the file is missing or truncated, or belongs to another cache.
    """

    def __init__(self, path: Path, key: str) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="numpy")
            self._record = json.loads((self._file.metadata() or {})["shard"])
            self.keys: NDArray[np.uint64] = self._file.get_tensor("keys")
            self.ends: NDArray[np.int64] = self._file.get_tensor("ends")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BrokenShard(f"{path.name} can't be read ({one_line(error, 120)})") from error
        if self._record["key"] != key:
            raise BrokenShard(f"{path.name} belongs to another cache")
        self._slices = [self._file.get_slice(name) for name in ("ids", "log_probs", "tails")]

    def read(self, index: int) -> list[NDArray[np.generic]]:
        """Reads ``ids``, ``log_probs`` and ``tails`` of the example at an index."""
        start = int(self.ends[index - 1]) if index else 0
        return [part[start : int(self.ends[index])] for part in self._slices]

    def is_intact(self) -> bool:
        """Checks the digest of all tensors against the one that was written."""
        digest: bool = self._record["digest"] == _digest({name: self._file.get_tensor(name) for name in NAMES})
        return digest


def _digest(arrays: dict[str, NDArray[np.generic]]) -> str:
    state = blake2b(digest_size=16)
    for name in NAMES:
        state.update(np.ascontiguousarray(arrays[name]).data)
    return state.hexdigest()
