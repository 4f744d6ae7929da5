"""Attention over packed rows by variable-length flash kernels, the shared prefix attended to apart.

Shapes in names: N tokens of all rows in one line, H query heads, K key-value heads, D head width, S segments.

A row is ``[prefix | a | b | ...]`` and every segment is contiguous, so the batch contract's rule splits in two sets of
keys: a token's own segment (causal, a variable-length kernel) and, for tokens behind a prefix, the whole prefix (dense,
no mask). Both give a partial output and its log-sum-exp, and the two are merged exactly::

    lse = logaddexp(lse_own, lse_prefix);   out = out_own * exp(lse_own - lse) + out_prefix * exp(lse_prefix - lse)

The backward pass needs no merging at all: a flash backward computes P = exp(S - lse) and rowsum(dO * O), so that each
part run with the *merged* out and lse gives its exact share of the gradients (the identity ring attention uses, Liu et
al., arXiv 2310.01889, sec. 3).

One kernel over all keys would make the prefix's one or two key blocks gather the gradients of every query in the row,
on one thread block a head (measured on FlexAttention: a backward three times slower). Here :data:`CHUNKS` groups of
queries get a copy of the prefix each, whose gradients are added up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from datamodules.batch import PADDING, PREFIX

CHUNKS = 8  #: groups of queries behind one prefix: 8 x 32 heads x 1-2 key blocks fill 132 multiprocessors twice


@dataclass(frozen=True)
class Prefix:
    """One row's shared prefix and the queries behind it, as positions in the line of N tokens.

    Attributes:
        start: first token of the prefix.
        length: tokens of the prefix.
        end: one past the row's last token that is no padding.
        cu_queries: int32 [chunks + 1], bounds of the query groups, counted from ``start + length``.
        cu_keys: int32 [chunks + 1], bounds of the prefix's copies.
        longest: most queries in a group, or 2.
    """

    start: int
    length: int
    end: int
    cu_queries: Tensor
    cu_keys: Tensor
    longest: int


@dataclass(frozen=True)
class SegmentPlan:
    """What the kernels need to know of a batch's segments; made on the host, so that no step waits for the device.

    Attributes:
        cu_segments: int32 [S + 1], bounds of every segment (prefix, examples, padding) of all rows.
        longest: tokens of the longest segment, or 2.
        prefixes: one entry for each row that has a prefix.
    """

    cu_segments: Tensor
    longest: int
    prefixes: tuple[Prefix, ...]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> SegmentPlan:
        """Copies the bounds to a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        prefixes = tuple(replace(p, cu_queries=move(p.cu_queries), cu_keys=move(p.cu_keys)) for p in self.prefixes)
        return replace(self, cu_segments=move(self.cu_segments), prefixes=prefixes)


def plan_segments(segment_ids_BT: Tensor, chunks: int = CHUNKS) -> SegmentPlan:
    """Reads a batch's segment ids, on the CPU.

    Args:
        segment_ids_BT: integers, see :mod:`datamodules.batch`; each row's segments are contiguous.
        chunks: groups of queries behind a prefix.
    """
    rows, tokens = segment_ids_BT.shape
    changes = torch.ones(rows, tokens, dtype=torch.bool)
    changes[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    bounds = torch.cat([changes.reshape(-1).nonzero().squeeze(1), torch.tensor([rows * tokens])]).to(torch.int32)
    prefixes = []
    for row, ids_T in enumerate(segment_ids_BT):
        length = int((ids_T == PREFIX).sum())
        end = int((ids_T != PADDING).sum())
        if 0 < length < end:
            cu_queries = torch.linspace(0, end - length, chunks + 1).round().to(torch.int32)
            cu_keys = torch.arange(chunks + 1, dtype=torch.int32) * length
            longest = _at_least_two(cu_queries)
            prefixes.append(Prefix(row * tokens, length, row * tokens + end, cu_queries, cu_keys, longest))
    return SegmentPlan(bounds, _at_least_two(bounds), tuple(prefixes))


def _at_least_two(bounds: Tensor) -> int:
    """The longest sequence; 1 would make the kernel swap heads and queries, as it does for decoding."""
    return max(2, int(bounds.diff().max()))


def packed_attention(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
    """Attends within segments and to the prefix; grouped-query heads are shared, not repeated.

    Args:
        query_NHD: queries with rotary positions applied; 16-bit on CUDA, any float type on a CPU.
        key_NKD: keys with rotary positions applied, H a multiple of K.
        value_NKD: values.
        plan: from :func:`plan_segments`, on the same device.
        scale: factor of the scores, 1/sqrt(D) as a rule.

    Returns:
        out_NHD, the dtype of ``query_NHD``. What padding attends to is unspecified.
    """
    return _PackedAttention.apply(query_NHD, key_NKD, value_NKD, plan, scale)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
        own = (plan.cu_segments, plan.cu_segments, plan.longest, plan.longest, True, scale)
        out, lse_HN = _attend(query, key, value, *own)
        for prefix in plan.prefixes:
            behind = slice(prefix.start + prefix.length, prefix.end)
            part, part_lse = _attend(
                query[behind], _copies(key, prefix), _copies(value, prefix), *_dense(prefix, scale)
            )
            _merge_(out[behind], lse_HN[:, behind], part, part_lse)
        ctx.save_for_backward(query, key, value, out, lse_HN)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse_HN = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        own = (plan.cu_segments, plan.cu_segments, plan.longest, plan.longest, True, scale)
        grad_query, grad_key, grad_value = _attend_backward(grad_out, query, key, value, out, lse_HN, *own)
        for prefix in plan.prefixes:
            behind, before = (
                slice(prefix.start + prefix.length, prefix.end),
                slice(prefix.start, prefix.start + prefix.length),
            )
            parts = _attend_backward(
                grad_out[behind], query[behind], _copies(key, prefix), _copies(value, prefix), out[behind],
                lse_HN[:, behind].contiguous(), *_dense(prefix, scale),
            )  # fmt: skip
            grad_query[behind] += parts[0]
            grad_key[before] += parts[1].unflatten(0, (-1, prefix.length)).sum(0)
            grad_value[before] += parts[2].unflatten(0, (-1, prefix.length)).sum(0)
        return grad_query, grad_key, grad_value, None, None


def _copies(tensor: Tensor, prefix: Prefix) -> Tensor:
    """The prefix's keys or values, once for each group of queries: [chunks * P, K, D]."""
    return tensor[prefix.start : prefix.start + prefix.length].repeat(len(prefix.cu_queries) - 1, 1, 1)


def _dense(prefix: Prefix, scale: float) -> tuple[Tensor, Tensor, int, int, bool, float]:
    return prefix.cu_queries, prefix.cu_keys, prefix.longest, prefix.length, False, scale


def _merge_(out: Tensor, lse_HN: Tensor, part: Tensor, part_lse_HN: Tensor) -> None:
    """Merges a part into ``out`` and ``lse`` in place."""
    function = _compiled_merged() if out.is_cuda else _merged
    both, lse = function(out, lse_HN, part, part_lse_HN)
    out.copy_(both)
    lse_HN.copy_(lse)


def _merged(out: Tensor, lse_HN: Tensor, part: Tensor, part_lse_HN: Tensor) -> tuple[Tensor, Tensor]:
    merged = torch.logaddexp(lse_HN, part_lse_HN)
    weight, part_weight = (lse_HN - merged).exp().T[..., None], (part_lse_HN - merged).exp().T[..., None]
    return (out * weight + part * part_weight).to(out.dtype), merged


@cache
def _compiled_merged() -> Any:
    return torch.compile(_merged, dynamic=True)  # one kernel instead of five; the length differs from row to row


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Variable-length attention: (out_NHD, lse_HN in fp32)."""
    if query.is_cuda:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
        )
        return out, lse
    outs, lses = [], []
    for q, k, v in _sequences((query, cu_q), (key, cu_k), (value, cu_k)):
        scores = _scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        outs.append(torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).exp(), _shared(v, q)).to(query.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse_HN: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`_attend` where ``out`` and ``lse`` may cover more keys than ``key`` holds."""
    if query.is_cuda:
        state = torch.empty(2, dtype=torch.uint64, device=query.device)  # of dropout, which is 0
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), query, key, value, out, lse_HN, cu_q, cu_k, max_q, max_k, 0.0, causal, state,
            torch.empty(0, device=query.device), scale=scale,
        )  # fmt: skip
    grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    pieces = _sequences((query, cu_q), (key, cu_k), (value, cu_k), (out, cu_q), (grad, cu_q), (lse_HN.T, cu_q))
    for q, k, v, o, g, lse in pieces:
        weights = (_scores(q, k, causal, scale) - lse.T[..., None]).exp()
        g32, o32 = g.to(weights.dtype), o.to(weights.dtype)
        delta = (g32 * o32).sum(-1).T[..., None]
        grad_scores = weights * (torch.einsum("qhd,khd->hqk", g32, _shared(v, q)) - delta) * scale
        grads[0].append(torch.einsum("hqk,khd->qhd", grad_scores, _shared(k, q)).to(q.dtype))
        grads[1].append(_summed(torch.einsum("hqk,qhd->khd", grad_scores, q.to(weights.dtype)), k))
        grads[2].append(_summed(torch.einsum("hqk,qhd->khd", weights, g32), v))
    return torch.cat(grads[0]), torch.cat(grads[1]), torch.cat(grads[2])


def _sequences(*tensors: tuple[Tensor, Tensor]) -> Any:
    """Walks several tensors sequence by sequence, each with its own bounds."""
    return zip(*(t.split(cu.diff().tolist()) for t, cu in tensors), strict=True)


def _shared(key: Tensor, query: Tensor) -> Tensor:
    """Key-value heads as query heads see them, in the dtype that scores are computed in."""
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1).to(torch.promote_types(key.dtype, torch.float32))


def _summed(grad: Tensor, key: Tensor) -> Tensor:
    """Adds the gradients of query heads that share a key-value head."""
    return grad.unflatten(1, (key.shape[1], -1)).sum(2).to(key.dtype)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    shared = _shared(key, query)
    scores = torch.einsum("qhd,khd->hqk", query.to(shared.dtype), shared) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores
