"""Segment ids -> the attention mask that each backend of transformers takes.

Shapes in names: B rows, T tokens a row (q queries, k keys).

The rule is the batch contract's: q may attend to k where ``k <= q`` and (``seg[k] == seg[q]``, or ``seg[k] == 0`` and
``seg[q] > 0``). Padding attends to padding, so no query is without a key and no softmax divides by zero. A sliding
window counts positions, not places in the row: behind a shared prefix the two differ.
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

OwnAttention = Literal["blockwise", "pallas"]  #: what transformers does not bring itself
AttnImplementation = Literal["sdpa", "flex_attention", "eager", OwnAttention]


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
        A BlockMask for ``flex_attention``, bool [B, 1, T, T] for ``sdpa``, ``dtype`` [B, 1, T, T] for ``eager``;
        int64 [B, 1, 2, T] for our own, which take segments and positions themselves.

    Raises:
        ValueError: a backend whose mask is not known here.
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
    raise ValueError(f"attention {attention}: no mask is known for it; use {', '.join(get_args(AttnImplementation))}")


def register_attention(attention: str) -> None:
    """Makes one of our own implementations known to transformers; others pass."""
    if attention not in get_args(OwnAttention):
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(attention, _blockwise if attention == "blockwise" else _pallas)
    AttentionMaskInterface.register(attention, sdpa_mask)  # for calls without our mask, such as generation


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
    """Blockwise attention under the signature that transformers calls; returns [B, T, H, D]."""
    if not _is_ours(attention_mask):
        return _sdpa(module, query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling=scaling, **kwargs)
    _refuse_dropout("blockwise", kwargs)
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
    """torch_xla's Pallas kernel, for TPUs: segments must be equal, so there can be no shared prefix and no window."""
    if not _is_ours(attention_mask):
        return _sdpa(module, query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling=scaling, **kwargs)
    _refuse_dropout("pallas", kwargs)
    _check_tpu(query_BHTD.device)
    from torch_xla.distributed.spmd import get_global_mesh
    from torch_xla.experimental.custom_kernel import flash_attention

    if sliding_window is not None and sliding_window < query_BHTD.shape[2]:
        raise UserError(
            f"backbone.attn_implementation pallas: it has no window of {sliding_window}; set it to blockwise"
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


def _is_ours(mask: Tensor | None) -> TypeGuard[Tensor]:
    return mask is not None and mask.dtype == torch.int64  # transformers' masks are bool, or to be added to scores


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output: tuple[Tensor, None] = sdpa_attention_forward(*args, **kwargs)
    return output


def _refuse_dropout(attention: str, kwargs: dict[str, Any]) -> None:
    if kwargs.get("dropout"):
        raise UserError(f"backbone.attn_implementation {attention}: it computes no attention dropout; set it to sdpa")


def _check_tpu(device: torch.device) -> None:
    if device.type == "xla":
        import torch_xla.runtime as xr

        if xr.device_type() == "TPU":
            return
    raise UserError(
        "backbone.attn_implementation pallas: its kernel needs a TPU, and there is none; set it to blockwise"
    )


def _rule(segment_ids_BT: Tensor, position_ids_BT: Tensor | None, window: int | None) -> Callable[..., Tensor]:
    def rule(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = segment_ids_BT[b, q], segment_ids_BT[b, k]
        seen = (k <= q) & ((key == query) | ((key == PREFIX) & (query > PREFIX)))
        if position_ids_BT is None or window is None:
            return seen
        return seen & (position_ids_BT[b, q] - position_ids_BT[b, k] < window)

    return rule
