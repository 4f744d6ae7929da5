"""Segment ids -> the attention mask that each backend of transformers takes.

Shapes in names: B rows, T tokens a row (q queries, k keys).

The rule is the batch contract's: q may attend to k where ``k <= q`` and (``seg[k] == seg[q]``, or ``seg[k] == 0`` and
``seg[q] > 0``). Padding attends to padding, so no query is without a key and no softmax divides by zero. A sliding
window counts positions, not places in the row: behind a shared prefix the two differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from datamodules.batch import PREFIX, Batch

if TYPE_CHECKING:
    from collections.abc import Callable

Attention = Literal["sdpa", "flex_attention", "eager"]


def segment_mask(segment_ids_BT: Tensor, position_ids_BT: Tensor | None = None, window: int | None = None) -> Tensor:
    """Builds the mask in full.

    Args:
        segment_ids_BT: see :mod:`datamodules.batch`.
        position_ids_BT: rotary positions; wanted with a window only.
        window: how many positions a query sees, itself included; None for all.

    Returns:
        bool [B, 1, T, T], true where the query (third axis) may attend to the key (fourth axis).
    """
    query, key = segment_ids_BT[:, None, :, None], segment_ids_BT[:, None, None, :]
    tokens = segment_ids_BT.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=segment_ids_BT.device).tril()
    mask = causal & ((key == query) | ((key == PREFIX) & (query > PREFIX)))
    if window is not None:
        assert position_ids_BT is not None, "a window counts positions"
        mask &= position_ids_BT[:, None, :, None] - position_ids_BT[:, None, None, :] < window
    return mask


def block_mask(segment_ids_BT: Tensor, position_ids_BT: Tensor | None = None, window: int | None = None) -> Any:
    """The same mask as FlexAttention's ``BlockMask``, which lets its kernel skip empty blocks; arguments as above."""
    from torch.nn.attention.flex_attention import create_block_mask

    rule = _rule(segment_ids_BT, position_ids_BT, window)
    rows, tokens = segment_ids_BT.shape
    return create_block_mask(rule, rows, None, tokens, tokens, device=str(segment_ids_BT.device))


def attention_mask(batch: Batch, attention: str, dtype: torch.dtype, window: int | None = None) -> Any:
    """Builds the mask of a batch in the form that a backend takes.

    Args:
        batch: rows whose examples may not see each other.
        attention: ``config._attn_implementation`` of the model.
        dtype: of the attention scores; the mask of ``eager`` is added to them.
        window: see :func:`segment_mask`.

    Returns:
        A BlockMask for ``flex_attention``, bool [B, 1, T, T] for ``sdpa``, ``dtype`` [B, 1, T, T] for ``eager``.

    Raises:
        ValueError: a backend whose mask is not known here.
    """
    arguments = (batch.segment_ids_BT, batch.position_ids_BT, window)
    if attention == "flex_attention":
        return block_mask(*arguments)
    mask = segment_mask(*arguments)
    if attention == "sdpa":
        return mask
    if attention == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    raise ValueError(f"attention {attention}: no mask is known for it; use sdpa, flex_attention or eager")


def _rule(segment_ids_BT: Tensor, position_ids_BT: Tensor | None, window: int | None) -> Callable[..., Tensor]:
    def rule(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = segment_ids_BT[b, q], segment_ids_BT[b, k]
        seen = (k <= q) & ((key == query) | ((key == PREFIX) & (query > PREFIX)))
        if position_ids_BT is None or window is None:
            return seen
        return seen & (position_ids_BT[b, q] - position_ids_BT[b, k] < window)

    return rule
