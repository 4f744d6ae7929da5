"""A prompt prefix that is computed once: its keys and values in front of every row of every batch.

Shapes in names: B rows, P prefix tokens, S tokens of the rest of a prompt, L tokens in the cache, H heads, D head
width, V vocabulary. See :mod:`lightning_modules.generation` for the layout of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from datamodules.errors import UserError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode, and gives every module its own mode back.

    As in training, a base in half precision computes in it where its adapter is kept in float32. FlexAttention, which
    would compile a kernel for every length, is replaced by SDPA meanwhile.
    """
    training = [module for module in model.modules() if module.training]
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    attention = getattr(getattr(base, "config", None), "_attn_implementation", None)
    model.eval()
    try:
        if attention == "flex_attention":
            base.set_attn_implementation("sdpa")
        with _autocast(model, adapted=base is not model):
            yield
    finally:
        if attention == "flex_attention":
            base.set_attn_implementation(attention)
        for module in training:
            module.training = True


def _autocast(model: nn.Module, adapted: bool) -> AbstractContextManager[Any]:
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    if not adapted or weight.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(weight.device.type, dtype=weight.dtype)


class _Room(DynamicLayer):
    """One layer's keys and values in a buffer of full length.

    ``DynamicLayer`` copies the whole cache at every token; here a token costs a token. Rows can be dropped.
    """

    def __init__(self, keys_1HPD: Tensor, values_1HPD: Tensor, rows: int, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys_1HPD, values_1HPD)
        self.length = keys_1HPD.shape[2]
        self._keys, self._values = (
            tensor.new_empty(rows, tensor.shape[1], length, tensor.shape[3]) for tensor in (keys_1HPD, values_1HPD)
        )
        self._keys[:, :, : self.length] = keys_1HPD
        self._values[:, :, : self.length] = values_1HPD

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends new positions and returns views of all; signature as in transformers."""
        start, self.length = self.length, self.length + key_states.shape[2]
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Returns the number of cached positions."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self._keys, self._values = self._keys[indices], self._values[indices]


class Prefix:
    """A model and the keys and values of the tokens that every prompt starts with.

    Attributes:
        model: in evaluation mode.
        ids: the prefix; may be empty.
        positions: how many positions the model knows.
    """

    def __init__(self, model: nn.Module, ids: list[int]) -> None:
        self.model, self.ids = model, ids
        self.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        config: Any = model.config
        self.positions: int = getattr(config, "max_position_embeddings", None) or 1 << 30
        window: int | None = getattr(config, "sliding_window", None)
        self.window = window or self.positions
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        if ids:
            model(input_ids=self._tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.layers: list[Any] = cache.layers

    def cache(self, rows: int, length: int) -> Cache:
        """A cache for so many rows with the prefix in front and room for ``length`` positions in all."""
        if not self.ids:
            return Cache(layer_class_to_replicate=DynamicLayer)
        return Cache(layers=[_Room(layer.keys, layer.values, rows, length) for layer in self.layers])

    def rest(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """What remains of the prompts, padded on the left.

        Returns:
            input_ids_BS, attention_mask_BL and position_ids_BS (L = P + S), and a cache with room for more positions.

        Raises:
            UserError: longer than the model's positions.
        """
        start, longest = len(self.ids), max(map(len, prompts))
        if longest + room > min(self.positions, self.window):
            raise UserError(
                f"a prompt of {longest} tokens and an answer of up to {room} do not fit the model's "
                f"{min(self.positions, self.window)} positions; shorten the input or lower max_new_tokens"
            )
        width = longest - start
        rests = [list(prompt[start:]) for prompt in prompts]
        ids_BS = self._tensor([[0] * (width - len(rest)) + rest for rest in rests])
        mask_BS = self._tensor([[0] * (width - len(rest)) + [1] * len(rest) for rest in rests])
        mask_BL = F.pad(mask_BS, (start, 0), value=1)
        position_BS = (mask_BL.cumsum(1) - 1).clamp_(min=0)[:, start:]
        return ids_BS, mask_BL, position_BS, self.cache(len(prompts), longest + room)

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, keep: int = 1) -> Tensor:
        """float32 logits of the last ``keep`` positions, [B, keep, V]."""
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=keep,
        )  # fmt: skip
        return output.logits[:, -keep:].float()

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)


def common_prefix(prefix: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
    """The longest beginning that prefix and prompts share, less what each prompt needs to have a token of its own."""
    length = min([len(prefix), *(len(prompt) - 1 for prompt in prompts)])
    while length and any(list(prompt[:length]) != list(prefix[:length]) for prompt in prompts):
        length -= 1
    return list(prefix[:length])


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches, the longest first: if memory is short it shows at once, and time left is not flattered."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]
