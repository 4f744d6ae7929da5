"""A prompt prefix that is computed once: its keys and values in front of every row of every batch.

Shapes in names: B rows, P prefix tokens, S tokens of the rest of a prompt, L tokens in the cache, H heads, D head
width, V vocabulary. See :mod:`lightning_modules.generation.engine` for the layout of the cache.
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode, and gives every module its own mode back.

    As in training, a base in half precision computes in it where its adapter is kept in float32. FlexAttention, which
    would compile a kernel for every length, is replaced by SDPA meanwhile.
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
    # the cache of casts holds addresses that a recorded graph would go on reading
    return torch.autocast(weight.device.type, dtype=weight.dtype, cache_enabled=False)


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
        positions: how many positions the model knows and attends to.
        layers: keys [1, H, P, D] and values of each layer.
    """

    def __init__(self, model: nn.Module, ids: list[int]) -> None:
        self.model, self.ids = model, ids
        self.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        config: Any = model.config
        self.positions = known_positions(config)
        self.attention: str = getattr(config, "_attn_implementation", "")
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        # without a prefix, one token of any kind tells the layers' shapes
        model(input_ids=self._tensor([ids or [0]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.layers: list[Any] = cache.layers
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, : len(ids)], layer.values[:, :, : len(ids)]

    @property
    def bytes_per_position(self) -> int:
        """Memory of one position's keys and values in all layers."""
        return sum(
            (t.shape[1] * t.shape[3] * t.element_size()) for layer in self.layers for t in (layer.keys, layer.values)
        )

    def cache(self, rows: int, length: int) -> Cache:
        """A cache for so many rows with the prefix in front and room for ``length`` positions in all."""
        return Cache(layers=[_Room(layer.keys, layer.values, rows, length) for layer in self.layers])

    def rest(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """What remains of the prompts, padded on the left.

        Returns:
            input_ids_BS, attention_mask_BL and position_ids_BS (L = P + S), and a cache with room for more positions.

        Raises:
            UserError: longer than the model's positions.
        """
        start, longest = len(self.ids), max(map(len, prompts))
        if longest + room > self.positions:
            raise UserError(
                f"a prompt of {longest} tokens and an answer of up to {room} do not fit the model's "
                f"{self.positions} positions; shorten the input or lower max_new_tokens"
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


def bounded_prompts(
    chat: ChatFormat, task: Task, contents: Sequence[str], limit: int
) -> tuple[list[list[int]], list[int]]:
    """Prompts of at most so many tokens, and for each how many of its content's tokens were cut for it.

    The cut is in the middle of the content, see
    :meth:`~datamodules.tokenization.chat_format.ChatFormat.truncate_prompt`.

    Raises:
        UserError: the instruction alone is longer.
    """
    prompts, cuts = [list(ids) for ids in chat.prompt_ids(task, contents)], [0] * len(contents)
    shortest = len(chat.prefix_ids(task)) + 8  # of which some are left for the content
    for index, (content, ids) in enumerate(zip(contents, prompts, strict=True)):
        if len(ids) <= limit:
            continue
        if limit < shortest:
            raise UserError(
                f"a prompt of {len(ids)} tokens leaves no room for an answer within the model's positions; "
                "lower max_new_tokens"
            )
        prompts[index], cuts[index] = chat.truncate_prompt(task, content, limit)
    return prompts, cuts


def known_positions(config: Any) -> int:
    """How many positions a model knows and attends to, by its config; 2**20 where it does not say."""
    known = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return min((value for value in known if value), default=1 << 20)


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
