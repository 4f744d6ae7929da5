"""Keys and values of a prompt prefix that are computed once and copied to the front of every row of every batch.

Shapes in names: B rows, P prefix tokens, S tokens of a prompt after the prefix, L tokens in the cache, H heads, D head
width, V vocabulary. :mod:`lightning_modules.generation.loglikelihood` has a drawing of the cache's layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from datamodules.errors import UserError
from lightning_modules.models.attention_masks import attn_implementation

if TYPE_CHECKING:
    from datamodules.tasks.base import Task
    from datamodules.tokenization.chat_format import ChatFormat


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode, and restores the mode of every module afterwards.

    As in training, a base in half precision computes in half precision even if its adapter is kept in float32.
    FlexAttention would compile a kernel for every length, so SDPA replaces it meanwhile.
    """
    training = [module for module in model.modules() if module.training]
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    attention = attn_implementation(getattr(base, "config", None))
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
    # no cache of casts: a recorded CUDA graph would continue to read its addresses after they are freed
    return torch.autocast(weight.device.type, dtype=weight.dtype, cache_enabled=False)


class StaticCacheLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that has its full length from the start.

    ``DynamicLayer`` copies the whole cache for every new token; this layer copies the new token only. Rows can be
    dropped.
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
        """Appends new positions and returns views of all positions; the signature is that of transformers."""
        start, self.length = self.length, self.length + key_states.shape[2]
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Returns the number of cached positions."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at ``indices``, which may repeat."""
        self._keys, self._values = self._keys[indices], self._values[indices]


class PrefixCache:
    """A model together with the keys and values of the tokens that every prompt starts with.

    Attributes:
        model: the model, in evaluation mode.
        ids: token ids of the prefix; may be empty.
        positions: number of positions that the model knows and attends to.
        layers: keys [1, H, P, D] and values of each layer.
    """

    def __init__(self, model: nn.Module, ids: list[int]) -> None:
        self.model, self.ids = model, ids
        self.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        config: Any = model.config
        self.positions = max_positions(config)
        self.attention = attn_implementation(config)
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        # if there is no prefix, one arbitrary token shows the shapes of the layers
        model(input_ids=self._tensor([ids or [0]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.layers: list[Any] = cache.layers
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, : len(ids)], layer.values[:, :, : len(ids)]

    @property
    def bytes_per_position(self) -> int:
        """Memory of the keys and values of one position in all layers, in bytes."""
        return sum(
            (t.shape[1] * t.shape[3] * t.element_size()) for layer in self.layers for t in (layer.keys, layer.values)
        )

    def new_cache(self, rows: int, length: int) -> Cache:
        """Returns a cache of ``rows`` rows that begin with the prefix and hold up to ``length`` positions each."""
        return Cache(layers=[StaticCacheLayer(layer.keys, layer.values, rows, length) for layer in self.layers])

    def prepare_batch(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """Pads the prompts' tokens after the prefix on the left, and makes a cache for them.

        Args:
            prompts: whole prompts, each longer than the prefix.
            new_tokens: number of positions that the cache holds after the longest prompt.

        Returns:
            input_ids_BS, attention_mask_BL and position_ids_BS (L = P + S), and the cache.

        Raises:
            UserError: the prompts and the new tokens are more than the model's positions.
        """
        start, longest = len(self.ids), max(map(len, prompts))
        if longest + new_tokens > self.positions:
            raise UserError(
                f"a prompt of {longest} tokens and an answer of up to {new_tokens} do not fit the model's "
                f"{self.positions} positions; shorten the input or lower max_new_tokens"
            )
        width = longest - start
        rests = [list(prompt[start:]) for prompt in prompts]
        ids_BS = self._tensor([[0] * (width - len(rest)) + rest for rest in rests])
        mask_BS = self._tensor([[0] * (width - len(rest)) + [1] * len(rest) for rest in rests])
        mask_BL = F.pad(mask_BS, (start, 0), value=1)
        position_BS = (mask_BL.cumsum(1) - 1).clamp_(min=0)[:, start:]
        return ids_BS, mask_BL, position_BS, self.new_cache(len(prompts), longest + new_tokens)

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, keep: int = 1) -> Tensor:
        """Computes float32 logits [B, keep, V] of the last ``keep`` positions."""
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=keep,
        )  # fmt: skip
        return output.logits[:, -keep:].float()

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)


def truncate_prompts(
    chat: ChatFormat, task: Task, contents: Sequence[str], prompts: Sequence[Sequence[int]], limit: int
) -> tuple[list[list[int]], list[int]]:
    """Cuts prompts that are longer than a limit.

    The cut is in the middle of the content, see
    :meth:`~datamodules.tokenization.chat_format.ChatFormat.truncate_prompt`.

    Args:
        chat: chat format that encoded the prompts.
        task: the task of the prompts.
        contents: the variable part of each prompt.
        prompts: token ids of each whole prompt.
        limit: largest number of tokens of a prompt.

    Returns:
        The prompts, and the number of content tokens that were cut from each.

    Raises:
        UserError: the instruction alone is longer than the limit.
    """
    result, cuts = [list(ids) for ids in prompts], [0] * len(prompts)
    shortest = len(chat.prefix_ids(task)) + 8  # a few of these tokens are left for the content
    for index, (content, ids) in enumerate(zip(contents, prompts, strict=True)):
        if len(ids) <= limit:
            continue
        if limit < shortest:
            raise UserError(
                f"a prompt of {len(ids)} tokens leaves no room for an answer within the model's positions; "
                "lower max_new_tokens"
            )
        result[index], cuts[index] = chat.truncate_prompt(task, content, limit)
    return result, cuts


def max_positions(config: Any) -> int:
    """Returns the number of positions that a model knows and attends to; 2**20 if its config has no limit."""
    known = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return min((value for value in known if value), default=1 << 20)


def common_prefix(prefix: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
    """Returns the longest beginning that prefix and prompts share; every prompt keeps at least one token after it."""
    length = min([len(prefix), *(len(prompt) - 1 for prompt in prompts)])
    while length and any(list(prompt[:length]) != list(prefix[:length]) for prompt in prompts):
        length -= 1
    return list(prefix[:length])


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields batches of indices, the longest sequences first.

    A lack of memory then shows in the first batch, and an estimate of the remaining time is not too low.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]
