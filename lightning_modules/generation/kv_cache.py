"""Slots of a key-value cache that prompts take in turn, and the step that adds a token to each.

Shapes in names: B slots, P prefix tokens, S tokens of a prompt behind the prefix, L positions that a step looks at,
H heads of the keys, D head width, V vocabulary, W words of 32 bits that hold a bit for each of V tokens.

A slot's place in the cache is the token's position, so nothing is padded between prefix, prompt and answer, and a new
prompt can be put in a slot whose answer has ended while the others go on::

    slot 0 | prefix | prompt ............ | answer ....
    slot 1 | prefix | prompt .... | answer ........
    slot 2 | prefix | (free)

What a row may see is ``place <= its own position``: whatever lies behind is not seen and is written over. On a GPU the
shapes of a step come from a short list (slots in halves, positions in multiples of 256), and a step of a shape that is
met again is recorded as a CUDA graph: a step of a small model is a thousand kernel launches and hardly any arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from lightning_modules.generation.prefix_cache import Prefix
from lightning_modules.models.backend import is_sharded

PLACES = 256  #: a GPU's steps look at a multiple of so many positions; fewer shapes are fewer graphs to record
EAGER = 1  #: steps of a shape before its graph is recorded; they warm its kernels up
FEWEST = 8  #: a step of fewer slots is computed as one of so many


class SlotKVCache:
    """A cache of equal rows behind one prefix.

    Args:
        prefix: model and cached prefix.
        slots: B.
        length: positions of a slot, the prefix's among them.
    """

    def __init__(self, prefix: Prefix, slots: int, length: int) -> None:
        self.prefix, self.slots, self.device = prefix, slots, prefix.device
        # attention kernels want masks of an even width
        self.length = -(-length // PLACES) * PLACES if self.device.type == "cuda" else length
        self._start = len(prefix.ids)
        self._layers = [_Layer(self, layer.keys, layer.values) for layer in prefix.layers]
        self._cache = Cache(layers=self._layers)
        recorded = self.device.type == "cuda" and not any(map(is_sharded, prefix.model.parameters()))
        self._graphs = _Graphs(self._next) if recorded else None
        self._put: Callable[[Tensor, Tensor], Tensor] = _nowhere
        self._additive = prefix.attention == "eager"

    def fill(self, slots: Sequence[int], rests: Sequence[Sequence[int]]) -> None:
        """Puts prompts into slots.

        Args:
            slots: which.
            rests: for each the prompt's tokens behind the prefix, without its last one: that is the first step's input.
        """
        start, width = self._start, max(map(len, rests))
        if not width:
            return
        ids_BS = torch.tensor([[*rest, *[0] * (width - len(rest))] for rest in rests], device=self.device)
        rows = torch.tensor(list(slots), device=self.device)
        place = torch.arange(start + width, device=self.device)
        mask = (place <= place[start:, None]).expand(len(rests), 1, -1, -1)

        def put(buffer: Tensor, new: Tensor) -> Tensor:
            buffer[rows, :, start : start + width] = new  # a shorter row's padding is seen by nobody
            return buffer[rows, :, : start + width]

        self._put = put
        self._model(ids_BS, mask, place[None, start:].expand(len(rests), -1))

    def move(self, source: int, target: int) -> None:
        """Copies a slot's tokens to another."""
        for layer in self._layers:
            layer.move(source, target)

    def step(
        self, ids: Sequence[int], positions: Sequence[int], allowed: Callable[[], Tensor | None]
    ) -> tuple[list[int], list[Any]]:
        """Adds one token to each of the first slots.

        Args:
            ids: the newest token of each slot.
            positions: its position. A slot that is free gets any token at position P.
            allowed: makes int32 [B, W] on the CPU, a bit for each token that may come next, or None, which allows all.
                It is called while a GPU computes.

        Returns:
            The most likely token of each slot, and its log-probability.
        """
        count, seen = len(ids), max(positions) + 1
        rows = torch.tensor([ids, positions])
        if self._graphs is None:
            logits_BV = self._next(rows, seen)
        else:
            rows = F.pad(rows, (0, _halves(self.slots, count) - count))
            rows[1, count:] = self._start
            logits_BV = self._graphs(rows, min(-(-seen // PLACES) * PLACES, self.length))[:count]
        bits_BW = allowed()
        if bits_BW is not None:
            logits_BV = logits_BV.masked_fill(~unpacked(bits_BW.to(self.device), logits_BV.shape[1]), float("-inf"))
        logprob_B, tokens_B = logits_BV.log_softmax(-1).max(-1)
        both = torch.stack([tokens_B.double(), logprob_B.double()]).tolist()  # one wait for the device
        return list(map(int, both[0])), both[1]

    def _next(self, rows_2B: Tensor, seen: int) -> Tensor:
        """float32 logits [B, V] behind a step's tokens; no value of a tensor decides what is computed."""
        ids_B, positions_B = rows_2B.to(self.device)
        slot_B = torch.arange(len(ids_B), device=self.device)
        place_L = torch.arange(seen, device=self.device)
        mask = (place_L <= positions_B[:, None])[:, None, None, :]

        def put(buffer: Tensor, new: Tensor) -> Tensor:
            buffer[slot_B, :, positions_B] = new[:, :, 0]
            return buffer[: len(ids_B), :, :seen]

        self._put = put
        return self._model(ids_B[:, None], mask, positions_B[:, None])

    def _model(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """float32 logits [B, V] of the last position."""
        if self._additive:
            dtype = self._layers[0].dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill_(~mask, torch.finfo(dtype).min)
        return self.prefix.logits(ids, mask, positions, self._cache)[:, -1]


class _Layer(DynamicLayer):
    """One layer's keys and values; where new ones go is the slots' to say."""

    def __init__(self, owner: SlotKVCache, keys_1HPD: Tensor, values_1HPD: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys_1HPD, values_1HPD)
        self._owner = owner
        self._buffers = [self._buffer(tensor) for tensor in (keys_1HPD, values_1HPD)]

    def _buffer(self, prefix_1HPD: Tensor) -> Tensor:
        _, heads, start, width = prefix_1HPD.shape
        # zeros: what is masked is multiplied by 0, and memory as it is found may hold NaN
        buffer = prefix_1HPD.new_zeros(self._owner.slots, heads, self._owner.length, width)
        buffer[:, :, :start] = prefix_1HPD
        return buffer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new positions and returns all that the step looks at; signature as in transformers."""
        put = self._owner._put
        return put(self._buffers[0], key_states), put(self._buffers[1], value_states)

    def move(self, source: int, target: int) -> None:
        for buffer in self._buffers:
            buffer[target] = buffer[source]


class _Graphs:
    """Records steps that come again, one graph a shape, and replays them.

    A model that can't be recorded (its forward pass waits for a value) goes on step by step, with a warning.
    """

    def __init__(self, compute: Callable[[Tensor, int], Tensor]) -> None:
        self._compute, self._met = compute, Counter[tuple[int, int]]()
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor, Tensor]] = {}
        self._pool: Any = None
        self._possible = True

    def __call__(self, rows_2B: Tensor, seen: int) -> Tensor:
        key = (rows_2B.shape[1], seen)
        self._met[key] += 1
        if key not in self._graphs and self._possible and self._met[key] > EAGER:
            self._record(key, rows_2B)
        if key not in self._graphs:
            return self._compute(rows_2B, seen)
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
            # thread_local: a thread that makes batches ahead may go on copying meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits_BV = self._compute(rows, key[1])
        except RuntimeError as error:
            self._possible = False
            rank_zero_warn(f"generation goes on without CUDA graphs, this model can't be recorded: {str(error)[:200]}")
            return
        self._graphs[key] = graph, rows, logits_BV


@contextmanager
def grouped_attention(base: Any) -> Iterator[None]:
    """Lets a step's queries that share a key's head be one matrix, where the model has SDPA.

    transformers before 5.20 repeats keys and values for every query head instead, where there is a mask: for Mistral
    four times the cache is then written and read a step.
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

    if getattr(base.config, "_attn_implementation", None) != "sdpa":
        yield
        return
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")


def unpacked(bits_BW: Tensor, vocabulary: int) -> Tensor:
    """Bits as bool [B, V], the lowest first; tokens beyond the last word (an embedding's padding) are not allowed."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits_BW.device)
    allowed = ((bits_BW[:, :, None] >> shifts) & 1).bool().flatten(1)
    return F.pad(allowed, (0, max(vocabulary - allowed.shape[1], 0)), value=False)[:, :vocabulary]


def _halves(slots: int, needed: int) -> int:
    """The smallest of slots, slots / 2, slots / 4, ... that has room."""
    while (slots + 1) // 2 >= max(needed, FEWEST):
        slots = (slots + 1) // 2
    return slots


def _nowhere(buffer: Tensor, new: Tensor) -> Tensor:
    raise RuntimeError("a cache of slots is written by fill and step alone")
