"""Slots of a key-value cache that prompts take in turn, and the step that adds one token to each slot.

Shapes in names: B slots, P prefix tokens, S tokens of a prompt after the prefix, L positions that a step attends to,
H heads of the keys, D head width, V vocabulary, W words of 32 bits that hold one bit per token of the vocabulary.

A token's index in its slot is its position, so there is no padding between prefix, prompt and answer. A new prompt can
take a slot whose answer has ended while the other slots continue::

    slot 0 | prefix | prompt ............ | answer ....
    slot 1 | prefix | prompt .... | answer ........
    slot 2 | prefix | (free)

A row attends to ``index <= its own position``; later entries are masked, and new tokens overwrite them. On a GPU the
shapes of a step come from a short list (the slots are halved, positions are a multiple of 256), and a step whose shape
occurs again is recorded as a CUDA graph: a step of a small model is a thousand kernel launches and hardly any
arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from datamodules.errors import one_line
from lightning_modules.generation.prefix_cache import PrefixCache
from lightning_modules.models.attention_masks import attn_implementation
from lightning_modules.models.backend import is_sharded

POSITIONS_MULTIPLE = 256  #: a GPU's steps attend to a multiple of this; fewer shapes are fewer graphs to record
WARMUP_STEPS = 1  #: steps of a shape that warm up its kernels before its graph is recorded
MIN_SLOTS = 8  #: a step of fewer slots is computed as one of this many


@dataclass(frozen=True)
class CacheIndex:
    """The entries of a slot cache that one forward pass writes and reads.

    Attributes:
        slots_B: slot of each row.
        positions_BS: position of each new token.
        rows: slots to attend to, one per row: a slice (a view of the cache) or a tensor (a copy).
        length: L, number of positions to attend to.
    """

    slots_B: Tensor
    positions_BS: Tensor
    rows: slice | Tensor
    length: int


class SlotKVCache:
    """A cache of equal slots that all begin with one prefix.

    Args:
        prefix: the model and the cached prefix.
        num_slots: B.
        length: positions per slot, including the prefix.
    """

    def __init__(self, prefix: PrefixCache, num_slots: int, length: int) -> None:
        self.prefix, self.num_slots, self.device = prefix, num_slots, prefix.device
        # attention kernels need masks of an even width
        multiple = POSITIONS_MULTIPLE if self.device.type == "cuda" else 1
        self.length = -(-length // multiple) * multiple
        self._start = len(prefix.ids)
        self._layers = [_SlotLayer(layer.keys, layer.values, num_slots, self.length) for layer in prefix.layers]
        recorded = self.device.type == "cuda" and not any(map(is_sharded, prefix.model.parameters()))
        self._graphs = _StepGraphs(self._step_logits) if recorded else None
        self._additive_mask = prefix.attention == "eager"

    def fill(self, slots: Sequence[int], rests: Sequence[Sequence[int]]) -> None:
        """Computes prompts into slots.

        Args:
            slots: the slot of each prompt.
            rests: the tokens of each prompt after the prefix, without the last one, which is the input of the first
                step.
        """
        start, width = self._start, max(map(len, rests))
        if not width:
            return
        ids_BS = torch.tensor([[*rest, *[0] * (width - len(rest))] for rest in rests], device=self.device)
        slots_B = torch.tensor(list(slots), device=self.device)
        position_L = torch.arange(start + width, device=self.device)
        mask = (position_L <= position_L[start:, None]).expand(len(rests), 1, -1, -1)
        # the padding of a shorter prompt is written too; it is masked until new tokens overwrite it
        positions_BS = position_L[None, start:].expand(len(rests), -1)
        self._forward(ids_BS, mask, CacheIndex(slots_B, positions_BS, slots_B, start + width))

    def move(self, source: int, target: int) -> None:
        """Copies the tokens of one slot to another."""
        for layer in self._layers:
            layer.move(source, target)

    def step(
        self, ids: Sequence[int], positions: Sequence[int], allowed: Callable[[], Tensor | None]
    ) -> tuple[list[int], list[Any]]:
        """Adds one token to each of the first slots.

        Args:
            ids: the newest token of each slot.
            positions: the position of that token. A free slot gets any token at position P.
            allowed: returns int32 [B, W] on the CPU, one bit per token that may come next, or None, which allows all.
                It is called while a GPU computes.

        Returns:
            The most likely token of each slot, and its log-probability.
        """
        count, length = len(ids), max(positions) + 1
        rows = torch.tensor([ids, positions])
        if self._graphs is None:
            logits_BV = self._step_logits(rows, length)
        else:
            rows = F.pad(rows, (0, _padded_slots(self.num_slots, count) - count))
            rows[1, count:] = self._start
            multiple = -(-length // POSITIONS_MULTIPLE) * POSITIONS_MULTIPLE
            logits_BV = self._graphs(rows, min(multiple, self.length))[:count]
        bits_BW = allowed()
        if bits_BW is not None:
            logits_BV = logits_BV.masked_fill(~unpack_bits(bits_BW.to(self.device), logits_BV.shape[1]), float("-inf"))
        logprob_B, tokens_B = logits_BV.log_softmax(-1).max(-1)
        both = torch.stack([tokens_B.double(), logprob_B.double()]).tolist()  # one synchronization with the device
        return list(map(int, both[0])), both[1]

    def _step_logits(self, rows_2B: Tensor, length: int) -> Tensor:
        """Computes float32 logits [B, V] after a step's tokens; control flow depends on shapes only."""
        ids_B, positions_B = rows_2B.to(self.device)
        slots_B = torch.arange(len(ids_B), device=self.device)
        position_L = torch.arange(length, device=self.device)
        mask = (position_L <= positions_B[:, None])[:, None, None, :]
        index = CacheIndex(slots_B, positions_B[:, None], slice(len(ids_B)), length)
        return self._forward(ids_B[:, None], mask, index)

    def _forward(self, ids_BS: Tensor, mask: Tensor, index: CacheIndex) -> Tensor:
        """Computes float32 logits [B, V] of the last position, and writes the new keys and values at ``index``."""
        if self._additive_mask:
            dtype = self._layers[0].dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill_(~mask, torch.finfo(dtype).min)
        cache = Cache(layers=[_IndexedLayer(layer, index) for layer in self._layers])
        return self.prefix.logits(ids_BS, mask, index.positions_BS, cache)[:, -1]


class _SlotLayer:
    """Keys and values of one layer in all slots, [B, H, length, D] each."""

    def __init__(self, keys_1HPD: Tensor, values_1HPD: Tensor, num_slots: int, length: int) -> None:
        self.dtype = keys_1HPD.dtype
        self.keys, self.values = (_buffer(tensor, num_slots, length) for tensor in (keys_1HPD, values_1HPD))

    def move(self, source: int, target: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[target] = buffer[source]


def _buffer(prefix_1HPD: Tensor, num_slots: int, length: int) -> Tensor:
    _, heads, start, width = prefix_1HPD.shape
    # zeros, since masked values are multiplied by 0 and uninitialized memory may hold NaN
    buffer = prefix_1HPD.new_zeros(num_slots, heads, length, width)
    buffer[:, :, :start] = prefix_1HPD
    return buffer


class _IndexedLayer(DynamicLayer):
    """One layer of the cache for one forward pass, which writes at a given index."""

    def __init__(self, slots: _SlotLayer, index: CacheIndex) -> None:
        super().__init__()  # no lazy_initialization, which would make two empty tensors per layer and step
        self._slots, self._index = slots, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new positions and returns all that the pass attends to; the signature is that of transformers."""
        return self._write(self._slots.keys, key_states), self._write(self._slots.values, value_states)

    def _write(self, buffer: Tensor, new_BHSD: Tensor) -> Tensor:
        index = self._index
        buffer[index.slots_B[:, None], :, index.positions_BS] = new_BHSD.transpose(1, 2)
        return buffer[index.rows, :, : index.length]


class _StepGraphs:
    """Records steps whose shape occurs again, one CUDA graph per shape, and replays them.

    A model that can't be recorded, because its forward pass waits for a value, continues without graphs after a
    warning.
    """

    def __init__(self, compute: Callable[[Tensor, int], Tensor]) -> None:
        self._compute, self._seen = compute, Counter[tuple[int, int]]()
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor, Tensor]] = {}
        self._pool: Any = None
        self._possible = True

    def __call__(self, rows_2B: Tensor, length: int) -> Tensor:
        key = (rows_2B.shape[1], length)
        self._seen[key] += 1
        if key not in self._graphs and self._possible and self._seen[key] > WARMUP_STEPS:
            self._record(key, rows_2B)
        if key not in self._graphs:
            return self._compute(rows_2B, length)
        graph, rows, logits_BV = self._graphs[key]
        rows.copy_(rows_2B, non_blocking=True)
        graph.replay()
        return logits_BV

    def _record(self, key: tuple[int, int], rows_2B: Tensor) -> None:
        rows = rows_2B.cuda()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # thread_local: a thread that prefetches batches may continue to copy meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits_BV = self._compute(rows, key[1])
        except RuntimeError as error:
            self._possible = False
            rank_zero_warn(f"generation continues without CUDA graphs, this model can't be recorded: {one_line(error)}")
            return
        self._graphs[key] = graph, rows, logits_BV


@contextmanager
def grouped_attention(base: Any) -> Iterator[None]:
    """Computes the queries of a step that share a key's head as one matrix, for models with SDPA.

    With a mask, transformers before 5.20 repeats keys and values for every query head instead: for Mistral four times
    the cache is then written and read per step.
    """
    name = "grouped_sdpa"
    sdpa: Any = AttentionInterface()["sdpa"]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        rows, heads, queries, width = query.shape
        if queries > 1 or heads == key.shape[1] or mask is None or mask.shape[1] > 1:
            return sdpa(module, query, key, value, mask, **options)
        grouped = query.view(rows, key.shape[1], heads // key.shape[1], width)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=options.get("scaling"))
        return out.reshape(rows, 1, heads, width), None

    if attn_implementation(base.config) != "sdpa":
        yield
        return
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")


def unpack_bits(bits_BW: Tensor, vocabulary: int) -> Tensor:
    """Unpacks bits to bool [B, V], the lowest bit first.

    Tokens after the last word, which an embedding is padded with, are not allowed.
    """
    shifts = torch.arange(32, dtype=torch.int32, device=bits_BW.device)
    allowed = ((bits_BW[:, :, None] >> shifts) & 1).bool().flatten(1)
    return F.pad(allowed, (0, max(vocabulary - allowed.shape[1], 0)), value=False)[:, :vocabulary]


def _padded_slots(num_slots: int, needed: int) -> int:
    """Returns the smallest of num_slots, num_slots / 2, num_slots / 4, ... that is at least ``needed``."""
    while (num_slots + 1) // 2 >= max(needed, MIN_SLOTS):
        num_slots = (num_slots + 1) // 2
    return num_slots
