"""Tables of the keys that the queries of packed rows attend to, built on the host so that no step waits for the device.

A row is ``[prefix | a | b | ... | padding]`` and every segment is contiguous. So the rule of the batch contract splits
into two runs of keys: the segment of a token up to the token itself and, for tokens after a prefix, the whole prefix.

Shapes in names: B rows, T tokens per row, N tokens of all rows, concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import PADDING, PREFIX

ROWS = 128  #: queries times heads of a tile
KEYS = 64  #: keys of a tile
CHUNK = 512  #: queries after one prefix that share a partial sum of the gradients of the prefix


@dataclass(frozen=True)
class PrefixSpan:
    """The shared prefix of one row, as positions in the concatenated rows.

    Attributes:
        first: first token of the prefix.
        end: end of the prefix (exclusive), which is the first token after it.
        last: end of the tokens that attend to it (exclusive).
    """

    first: int
    end: int
    last: int


@dataclass(frozen=True)
class BlockTables:
    """Keys of each block of queries, and queries of each block of keys, for the kernels of a GPU; int32.

    Attributes:
        starts_N: first key of the segment of each token; a token of padding attends to itself only.
        prefix_N: end of the prefix before each token, 0 if there is none.
        queries: [blocks, 5]: first query and end, first key of their segments, first key and end of the prefix.
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
        bounds: bounds of every segment (prefix, examples, padding) of all rows, as positions in the N tokens.
        prefixes: one entry for each row that has a prefix and tokens after it.
        longest: number of tokens of the longest example, including its prefix; padding does not count.
        tables: bounds and prefixes for the GPU kernels.
    """

    bounds: tuple[int, ...]
    prefixes: tuple[PrefixSpan, ...]
    longest: int
    tables: BlockTables

    def to(self, device: torch.device | str, non_blocking: bool = True) -> AttentionPlan:
        """Copies the tables to a device; the bounds stay on the host, which reads them."""
        return replace(self, tables=self.tables.to(device, non_blocking))


def build_attention_plan(segment_ids_BT: Tensor, group: int) -> AttentionPlan:
    """Builds the plan of a batch, on the CPU.

    Args:
        segment_ids_BT: integers, see :mod:`datamodules.batch`; the segments of a row are contiguous.
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
            prefixes.append(PrefixSpan(first, first + int(length), first + int(last)))
    tables = _tables(bounds, ids_BT, prefixes, query_tokens(group))
    return AttentionPlan(tuple(bounds.tolist()), tuple(prefixes), _longest_example(bounds, ids_BT), tables)


def _longest_example(bounds: np.ndarray, ids_BT: np.ndarray) -> int:
    segments, prefix_lengths = ids_BT.ravel()[bounds[:-1]], (ids_BT == PREFIX).sum(1)
    before = np.where(segments > PREFIX, prefix_lengths[bounds[:-1] // ids_BT.shape[1]], 0)
    return int(np.where(segments == PADDING, 0, np.diff(bounds) + before).max(initial=0))


def query_tokens(group: int) -> int:
    """Returns the number of tokens of a block of queries: a tile has one row per token and head of a group."""
    return max(16, ROWS // (1 << (group - 1).bit_length()))


def _tables(bounds: np.ndarray, ids_BT: np.ndarray, prefixes: list[PrefixSpan], block: int) -> BlockTables:
    rows, tokens = ids_BT.shape
    positions, padding = np.arange(rows * tokens), ids_BT.ravel() == PADDING
    starts = np.where(padding, positions, np.repeat(bounds[:-1], np.diff(bounds)))
    ends = np.where(padding, positions + 1, np.repeat(bounds[1:], np.diff(bounds)))
    prefix, prefix_first = np.zeros_like(positions), np.zeros_like(positions)
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
    query_blocks = np.stack(queries, 1)
    # longest first: otherwise the last multiprocessor of a GPU would finish late with a long one that started late
    lengths = query_blocks[:, 1] - query_blocks[:, 2] + query_blocks[:, 4] - query_blocks[:, 3]
    query_blocks = query_blocks[np.argsort(-lengths, kind="stable")]
    tasks = tasks[np.argsort(tasks[:, 2] - tasks[:, 3], kind="stable")]
    return BlockTables(*(torch.from_numpy(array.astype(np.int32)) for array in (starts, prefix, query_blocks, tasks)))
