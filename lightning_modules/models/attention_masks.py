"""Attention masks of packed rows, in the form that each attention implementation of transformers takes.

Shapes in names: B rows, T tokens per row (q queries, k keys).

The rule is that of the batch contract: q may attend to k if ``k <= q`` and (``seg[k] == seg[q]``, or ``seg[k] == 0``
and ``seg[q] > 0``). Padding attends to padding, so that every query has a key and no softmax divides by zero. A sliding
window counts rotary positions, not indices in the row: after a shared prefix the two differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor

from datamodules.batch import PREFIX, Batch
from datamodules.errors import UserError
from lightning_modules.kernels.blockwise_attention import blockwise_attention

if TYPE_CHECKING:
    from collections.abc import Callable

OwnAttention = Literal["blockwise", "pallas"]  #: implementations that this project adds
AttnImplementation = Literal["sdpa", "flex_attention", "eager", OwnAttention]


def segment_mask(segment_ids_BT: Tensor, position_ids_BT: Tensor | None = None, window: int | None = None) -> Tensor:
    """Builds the dense mask.

    Args:
        segment_ids_BT: see :mod:`datamodules.batch`.
        position_ids_BT: rotary positions; needed only if there is a window.
        window: number of positions that a query attends to, including its own; None for all.

    Returns:
        bool [B, 1, T, T], true if the query (third axis) may attend to the key (fourth axis).
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
    """Builds the mask of :func:`segment_mask` as a ``BlockMask`` of FlexAttention, whose kernel skips empty blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    rule = _rule(segment_ids_BT, position_ids_BT, window)
    rows, tokens = segment_ids_BT.shape
    return create_block_mask(rule, rows, None, tokens, tokens, device=str(segment_ids_BT.device))


def attention_mask(batch: Batch, attention: str, dtype: torch.dtype, window: int | None = None) -> Any:
    """Builds the mask of a batch in the form that an attention implementation takes.

    Args:
        batch: rows whose examples may not attend to each other.
        attention: see :func:`attn_implementation`.
        dtype: of the attention scores; the mask of ``eager`` is added to them.
        window: see :func:`segment_mask`.

    Returns:
        A BlockMask for ``flex_attention``, bool [B, 1, T, T] for ``sdpa``, ``dtype`` [B, 1, T, T] for ``eager``;
        int64 [B, 1, 2, T] (segments and positions) for those that this project adds.

    Raises:
        ValueError: the form of the mask is not known for this implementation.
    """
    arguments = (batch.segment_ids_BT, batch.position_ids_BT, window)
    if attention == "flex_attention":
        return block_mask(*arguments)
    if attention in get_args(OwnAttention):
        return torch.stack([batch.segment_ids_BT, batch.position_ids_BT], 1)[:, None]
    mask = segment_mask(*arguments)
    if attention == "sdpa":
        return mask
    if attention == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    raise ValueError(f"attention {attention}: unknown form of mask; use {', '.join(get_args(AttnImplementation))}")


def attn_implementation(config: Any) -> str:
    """Returns the name of the attention implementation that a model with this config uses.

    transformers has a public setter (``model.set_attn_implementation``) but no public getter, so that this function is
    the only place that reads the private attribute. The name is empty if the config has none.
    """
    return getattr(config, "_attn_implementation", None) or ""


def register_attention(attention: str) -> None:
    """Registers an implementation that this project adds with transformers; ignores those that transformers has."""
    if attention not in get_args(OwnAttention):
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(attention, _blockwise if attention == "blockwise" else _pallas)
    AttentionMaskInterface.register(attention, sdpa_mask)  # for calls without a mask of this module, such as generation


def _blockwise(
    module: Any,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes blockwise attention, with the signature that transformers calls; returns [B, T, H, D]."""
    if not _has_segments(attention_mask):
        return _sdpa(module, query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling=scaling, **kwargs)
    _check_no_dropout("blockwise", kwargs)
    segments_BT, positions_BT = attention_mask[:, 0].unbind(1)
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    output = blockwise_attention(query_BHTD, key_BKTD, value_BKTD, segments_BT, positions_BT, scale, sliding_window)
    return output.transpose(1, 2), None


def _pallas(
    module: Any,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention by torch_xla's Pallas kernel, on TPUs.

    Its rule is equality of segments, so that it supports neither a shared prefix nor a window.
    """
    if not _has_segments(attention_mask):
        return _sdpa(module, query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling=scaling, **kwargs)
    _check_no_dropout("pallas", kwargs)
    _check_tpu(query_BHTD.device)
    from torch_xla.distributed.spmd import get_global_mesh
    from torch_xla.experimental.custom_kernel import flash_attention

    if sliding_window is not None and sliding_window < query_BHTD.shape[2]:
        raise UserError(
            f"backbone.attn_implementation=pallas: its kernel has no window of {sliding_window}. Fix: set blockwise"
        )
    groups = query_BHTD.shape[1] // key_BKTD.shape[1]
    key_BHTD, value_BHTD = (x.repeat_interleave(groups, 1) for x in (key_BKTD, value_BKTD))
    segments_BT = attention_mask[:, 0, 0]
    mesh = get_global_mesh()
    spec = (tuple(mesh.axis_names), None, None, None) if mesh is not None else None
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    output = flash_attention(
        query_BHTD, key_BHTD, value_BHTD, causal=True, q_segment_ids=segments_BT, kv_segment_ids=segments_BT,
        sm_scale=scale, partition_spec=spec, mesh=mesh,
    )  # fmt: skip
    return output.transpose(1, 2), None


def _has_segments(mask: Tensor | None) -> TypeGuard[Tensor]:
    # masks of transformers are bool, or floating-point values that are added to the scores
    return mask is not None and mask.dtype == torch.int64


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output: tuple[Tensor, None] = sdpa_attention_forward(*args, **kwargs)
    return output


def _check_no_dropout(attention: str, kwargs: dict[str, Any]) -> None:
    if kwargs.get("dropout"):
        raise UserError(f"backbone.attn_implementation={attention}: has no attention dropout. Fix: set sdpa")


def _check_tpu(device: torch.device) -> None:
    if device.type == "xla":
        import torch_xla.runtime as xr

        if xr.device_type() == "TPU":
            return
    raise UserError(
        "backbone.attn_implementation=pallas: its kernel needs a TPU, and there is none. Fix: set blockwise"
    )


def _rule(segment_ids_BT: Tensor, position_ids_BT: Tensor | None, window: int | None) -> Callable[..., Tensor]:
    """Returns the mask as a function of indices, as ``create_block_mask`` takes it."""

    def rule(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = segment_ids_BT[b, q], segment_ids_BT[b, k]
        allowed = (k <= q) & ((key == query) | ((key == PREFIX) & (query > PREFIX)))
        if position_ids_BT is None or window is None:
            return allowed
        return allowed & (position_ids_BT[b, q] - position_ids_BT[b, k] < window)

    return rule
