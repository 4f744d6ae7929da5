"""Attention over packed rows in blocks of queries: basic operations, no T x T scores, for compilers such as XLA.

Shapes in names: B rows, T tokens per row (Q of a block of queries, S keys up to its end), K key heads, G query heads of
one key head, D channels of a head.

A block of queries attends to keys up to its end, so scores have the size Q x S and need half the products of a full
square. Nothing of that size is kept: the backward pass recomputes the probabilities of a block from the logarithm of
their sum (Dao et al., arXiv 2205.14135, algorithm 4, with whole rows of keys). Scores and sums are float32 or wider; so
are the gradients of keys and values, which are sums over blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from datamodules.batch import PREFIX

BLOCK = 512  #: queries of a block


class _MaskRule:
    """The mask of a block of queries: the rule of the batch contract, and a window."""

    def __init__(self, segments_BT: Tensor, positions_BT: Tensor, window: int | None) -> None:
        self.segments_BT, self.positions_BT, self.window = segments_BT, positions_BT, window

    def masked(self, start: int, end: int) -> Tensor:
        """Computes bool [B, 1, 1, Q, S], true if the query may not attend to the key."""
        key, query = self.segments_BT[:, None, None, None, :end], self.segments_BT[:, None, None, start:end, None]
        index = torch.arange(end, device=key.device)
        allowed = (key == query) | ((key == PREFIX) & (query > PREFIX))
        allowed = allowed & (index <= index[start:, None])
        if self.window is not None:
            at = self.positions_BT
            allowed = allowed & (at[:, None, None, start:end, None] - at[:, None, None, None, :end] < self.window)
        return ~allowed


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BKGTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, rule: _MaskRule, scale: float, block: int
    ) -> Tensor:
        outputs: list[Tensor] = []
        sums: list[Tensor] = []
        for start, end in _blocks(query_BKGTD.shape[-2], block):
            query_BKGQD = _ordered_after(outputs[-1:], query_BKGTD[..., start:end, :])
            scores = _scores(query_BKGQD, key_BKTD, rule, scale, start, end)
            log_sum = torch.logsumexp(scores, -1, keepdim=True)
            probabilities = (scores - log_sum).exp().to(value_BKTD.dtype)
            outputs.append(torch.matmul(probabilities, value_BKTD[:, :, None, :end]))
            sums.append(log_sum)
        output_BKGTD, log_sum_BKGT1 = torch.cat(outputs, -2), torch.cat(sums, -2)
        tensors = (query_BKGTD, key_BKTD, value_BKTD, output_BKGTD, log_sum_BKGT1)
        ctx.save_for_backward(*tensors, rule.segments_BT, rule.positions_BT)
        ctx.window, ctx.scale, ctx.block = rule.window, scale, block
        return output_BKGTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BKGTD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum, segments_BT, positions_BT = ctx.saved_tensors
        rule, wide = _MaskRule(segments_BT, positions_BT, ctx.window), log_sum.dtype
        dot_BKGT1 = (grad_BKGTD.to(wide) * output.to(wide)).sum(-1, keepdim=True)
        query_grads: list[Tensor] = []
        key_grad, value_grad = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for start, end in _blocks(query.shape[-2], ctx.block):
            block, grad = slice(start, end), grad_BKGTD[..., start:end, :]
            before = [*query_grads[-1:], key_grad, value_grad] if query_grads else []
            query_block = _ordered_after(before, query[..., block, :])
            scores = _scores(query_block, key, rule, ctx.scale, start, end)
            probabilities = (scores - log_sum[..., block, :]).exp()
            grad_probabilities = torch.matmul(grad.to(wide), value[:, :, None, :end].to(wide).transpose(-1, -2))
            grad_scores = (probabilities * (grad_probabilities - dot_BKGT1[..., block, :]) * ctx.scale).to(query.dtype)
            query_grads.append(torch.matmul(grad_scores, key[:, :, None, :end]))
            _add_to(key_grad, end, grad_scores, query_block)
            _add_to(value_grad, end, probabilities.to(grad.dtype), grad)
        return torch.cat(query_grads, -2), key_grad.to(key.dtype), value_grad.to(value.dtype), None, None, None


def blockwise_attention(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    segments_BT: Tensor,
    positions_BT: Tensor,
    scale: float,
    window: int | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Computes attention within the segments of packed rows, and to their shared prefix.

    Args:
        query_BHTD: H heads, a multiple of the key heads.
        key_BKTD: as many heads as the values.
        value_BKTD: of the keys' shape.
        segments_BT: see :mod:`datamodules.batch`.
        positions_BT: rotary positions; read only if there is a window.
        scale: of the scores.
        window: number of positions that a query attends to, including its own; None for all.
        block: number of queries whose scores are in memory at the same time.

    Returns:
        [B, H, T, D] in the type of the values.
    """
    heads = key_BKTD.shape[1]
    grouped = query_BHTD.unflatten(1, (heads, -1))
    rule = _MaskRule(segments_BT, positions_BT, window)
    with torch.autocast(query_BHTD.device.type, enabled=False):  # autocast would round the scores
        output: Tensor = _BlockwiseAttention.apply(grouped, key_BKTD, value_BKTD, rule, scale, block)
    return output.flatten(1, 2)


def _blocks(tokens: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, tokens)) for start in range(0, tokens, block)]


def _ordered_after(before: list[Tensor], tensor: Tensor) -> Tensor:
    """Makes XLA compute uses of a tensor after other tensors, so that scores of one block are alive at a time."""
    if not before or tensor.device.type != "xla":
        return tensor
    import torch_xla.core.xla_model as xm

    tensor = tensor.clone()
    xm.optimization_barrier_([tensor, *before])
    return tensor


def _scores(query_BKGQD: Tensor, key: Tensor, rule: _MaskRule, scale: float, start: int, end: int) -> Tensor:
    wide = torch.promote_types(query_BKGQD.dtype, torch.float32)
    key_BKDS = key[:, :, None, :end].to(wide).transpose(-1, -2)
    scores = torch.matmul(query_BKGQD.to(wide), key_BKDS) * scale
    return scores.masked_fill(rule.masked(start, end), float("-inf"))


def _add_to(total_BKTD: Tensor, end: int, weights_BKGQS: Tensor, rows_BKGQD: Tensor) -> None:
    """Adds ``weights^T rows``, summed over the query heads of each key head, to the first ``end`` keys."""
    weights, rows = weights_BKGQS.flatten(2, 3), rows_BKGQD.flatten(2, 3)
    total_BKTD[:, :, :end] += torch.matmul(weights.transpose(-1, -2), rows).to(total_BKTD.dtype)
