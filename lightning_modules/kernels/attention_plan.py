"""Which keys the queries of packed rows meet, laid out on the host, so that no step waits for the device.

A row is ``[prefix | a | b | ... | padding]`` and every segment is contiguous, so the batch contract's rule splits in
two runs of keys: a token's own segment up to itself and, for tokens behind a prefix, the whole prefix.

Shapes in names: B rows, T tokens a row, N tokens of all rows in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import PADDING, PREFIX

ROWS = 128  #: queries times heads of a tile
KEYS = 64  #: keys of a tile
CHUNK = 512  #: queries behind one prefix that share a partial sum of the prefix's gradients


@dataclass(frozen=True)
class Prefix:
    """One row's shared prefix: its first token, its end, and the end of the tokens behind it."""

    first: int
    end: int
    last: int


@dataclass(frozen=True)
class BlockTables:
    """What each block of queries and each block of keys meets, for the GPU's kernels; int32.

    Attributes:
        starts_N: first key of each token's own segment; padding meets itself alone.
        prefix_N: end of the prefix before each token, 0 where there is none.
        queries: [blocks, 5]: first query and end, first key of their segments, the prefix's first key and end.
        keys: [tasks, 5]: first key and end, first query and end, and the slot of a partial sum, or -1.
    """

    starts_N: Tensor
    prefix_N: Tensor
    queries: Tensor
    keys: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> BlockTables:
        """Copies the tables to a device."""
        return replace(
            self, **{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        )


@dataclass(frozen=True)
class AttentionPlan:
    """The segments of a batch.

    Attributes:
        bounds: bounds of every segment (prefix, examples, padding) of all rows, as positions in the line of N tokens.
        prefixes: one entry for each row that has a prefix and something behind it.
        tables: the same for kernels.
    """

    bounds: tuple[int, ...]
    prefixes: tuple[Prefix, ...]
    tables: BlockTables

    @property
    def longest(self) -> int:
        """Tokens of the longest example, its prefix included."""
        own = max(end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False))
        return own + max((prefix.end - prefix.first for prefix in self.prefixes), default=0)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> AttentionPlan:
        """Copies the tables to a device; the rest stays on the host, where it is used."""
        return replace(self, tables=self.tables.to(device, non_blocking))


def build_attention_plan(segment_ids_BT: Tensor, group: int) -> AttentionPlan:
    """Reads a batch's segment ids, on the CPU.

    Args:
        segment_ids_BT: integers, see :mod:`datamodules.batch`; each row's segments are contiguous.
        group: query heads that share a key-value head.
    """
    ids_BT = segment_ids_BT.numpy()
    rows, tokens = ids_BT.shape
    changes = np.ones((rows, tokens), bool)
    changes[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    bounds = np.append(changes.ravel().nonzero()[0], rows * tokens)
    prefixes = []
    for row, (length, last) in enumerate(zip((ids_BT == PREFIX).sum(1), (ids_BT != PADDING).sum(1), strict=True)):
        if 0 < length < last:
            first = row * tokens
            prefixes.append(Prefix(first, first + int(length), first + int(last)))
    tables = _tables(bounds, ids_BT, prefixes, query_tokens(group))
    return AttentionPlan(tuple(bounds.tolist()), tuple(prefixes), tables)


def query_tokens(group: int) -> int:
    """Tokens of a block of queries: a tile's rows are its tokens times the heads of a group."""
    return max(16, ROWS // (1 << (group - 1).bit_length()))


def _tables(bounds: np.ndarray, ids_BT: np.ndarray, prefixes: list[Prefix], block: int) -> BlockTables:
    rows, tokens = ids_BT.shape
    here, padding = np.arange(rows * tokens), ids_BT.ravel() == PADDING
    starts = np.where(padding, here, np.repeat(bounds[:-1], np.diff(bounds)))
    ends = np.where(padding, here + 1, np.repeat(bounds[1:], np.diff(bounds)))
    prefix, prefix_first = np.zeros_like(here), np.zeros_like(here)
    for p in prefixes:
        prefix[p.end : p.last], prefix_first[p.end : p.last] = p.end, p.first

    def blocks(size: int) -> tuple[np.ndarray, np.ndarray]:
        low = (np.arange(rows)[:, None] * tokens + np.arange(0, tokens, size)).ravel()
        return low, np.minimum(low + size, (low // tokens + 1) * tokens)

    low, high = blocks(block)
    queries = [low, high, starts[low], np.maximum.reduceat(prefix_first, low), np.maximum.reduceat(prefix, low)]
    low, high = blocks(KEYS)
    own = np.stack([low, high, low, ends[high - 1], np.full_like(low, -1)], 1)
    shared = [
        (key, min(key + KEYS, p.end), query, min(query + CHUNK, p.last))
        for p in prefixes
        for query in range(p.end, p.last, CHUNK)
        for key in range(p.first, p.end, KEYS)
    ]
    slots = np.array([(*task, slot) for slot, task in enumerate(shared)], np.int64).reshape(-1, 5)
    tasks = np.concatenate([slots, own])
    walks = np.stack(queries, 1)
    # long walks begin first: a GPU's last multiprocessor would else wait for one that began late
    walks = walks[np.argsort(walks[:, 2] - walks[:, 1] + walks[:, 3] - walks[:, 4], kind="stable")]
    tasks = tasks[np.argsort(tasks[:, 2] - tasks[:, 3], kind="stable")]
    return BlockTables(*(torch.from_numpy(array.astype(np.int32)) for array in (starts, prefix, walks, tasks)))
