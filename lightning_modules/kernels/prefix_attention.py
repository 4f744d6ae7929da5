"""Attention over packed rows behind a shared prefix: a Triton kernel on CUDA, plain torch elsewhere.

Shapes in names: N tokens of all rows in one line, H query heads, K key-value heads, D head width.

A token attends to its own segment and, behind a prefix, to the whole prefix
(:mod:`lightning_modules.kernels.attention_plan`).
In plain torch each run of keys gives a partial output and its log-sum-exp, and two are merged exactly::

    lse = logaddexp(lse_a, lse_b);   out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)

The backward pass needs no merging: with P = exp(S - lse) and rowsum(dO * O) of the *merged* output, each run gives its
exact share of the gradients (the identity that ring attention uses, Liu et al., arXiv 2310.01889, sec. 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_modules.kernels.attention_plan import AttentionPlan

Inputs = tuple[Tensor, Tensor, Tensor]  #: queries, keys and values


def kernels_for(tensor: Tensor) -> Any:
    """The module of kernels for a tensor's device, or None."""
    if not tensor.is_cuda:
        return None
    from lightning_modules.kernels import prefix_attention_triton

    return prefix_attention_triton


def attend(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Attends within segments and to the prefix; grouped-query heads are shared, not repeated.

    Args:
        query_NHD: queries with rotary positions applied; 16-bit on CUDA, any float type elsewhere. Each token's heads
            lie together; tokens may be apart, as in a view of one buffer for all three.
        key_NKD: keys with rotary positions applied, H a multiple of K.
        value_NKD: values.
        plan: from :func:`lightning_modules.kernels.attention_plan.build_attention_plan`, on the same device.
        scale: factor of the scores, 1/sqrt(D) as a rule.

    Returns:
        out_NHD in the dtype of the queries, and what :func:`attend_backward` wants of it. What padding attends to is
        unspecified.
    """
    if kernels := kernels_for(query_NHD):
        result: tuple[Tensor, Tensor] = kernels.attend(query_NHD, key_NKD, value_NKD, plan.tables, scale)
        return result
    wide = torch.promote_types(query_NHD.dtype, torch.float32)
    out = torch.zeros(query_NHD.shape, dtype=wide)
    lse_HN = torch.full(query_NHD.shape[1::-1], float("-inf"), dtype=wide)
    for queries, keys, causal in _runs(plan):
        scores = _scores(query_NHD[queries], key_NKD[keys], causal, scale)
        part_lse = scores.logsumexp(-1)
        weights, value = (scores - part_lse[..., None]).exp(), _shared(value_NKD[keys], query_NHD)
        merged = torch.logaddexp(lse_HN[:, queries], part_lse)
        mine, old = ((lse - merged).exp().T[..., None] for lse in (part_lse, lse_HN[:, queries]))
        out[queries] = out[queries] * old + torch.einsum("hqk,khd->qhd", weights, value) * mine
        lse_HN[:, queries] = merged
    return out.to(query_NHD.dtype), lse_HN


def attend_backward(
    grad_NHD: Tensor, inputs: Inputs, out_NHD: Tensor, lse_HN: Tensor, plan: AttentionPlan, scale: float, grads: Inputs
) -> None:
    """Writes the gradients of queries, keys and values into ``grads``.

    Args:
        grad_NHD: gradient of the output.
        inputs: queries, keys and values, as :func:`attend` took them.
        out_NHD: output, as it gave it.
        lse_HN: log-sum-exp, as it gave it.
        plan: of the segments.
        scale: of the scores.
        grads: where to write; laid out as the inputs may be.
    """
    query_NHD, key_NKD, value_NKD = inputs
    if kernels := kernels_for(query_NHD):
        kernels.attend_backward(grad_NHD.contiguous(), inputs, out_NHD, lse_HN, plan, scale, grads)
        return
    sums = [torch.zeros(tensor.shape, dtype=lse_HN.dtype) for tensor in grads]
    delta_HN = (grad_NHD.to(lse_HN.dtype) * out_NHD).sum(-1).T
    for queries, keys, causal in _runs(plan):
        query, grad = query_NHD[queries], grad_NHD[queries].to(lse_HN.dtype)
        key, value = (_shared(tensor[keys], query_NHD) for tensor in (key_NKD, value_NKD))
        weights = (_scores(query, key_NKD[keys], causal, scale) - lse_HN[:, queries, None]).exp()
        grad_scores = weights * (torch.einsum("qhd,khd->hqk", grad, value) - delta_HN[:, queries, None]) * scale
        sums[0][queries] += torch.einsum("hqk,khd->qhd", grad_scores, key)
        sums[1][keys] += _summed(torch.einsum("hqk,qhd->khd", grad_scores, query.to(key.dtype)), key_NKD)
        sums[2][keys] += _summed(torch.einsum("hqk,qhd->khd", weights, grad), value_NKD)
    for target, total in zip(grads, sums, strict=True):
        target.copy_(total)


def _runs(plan: AttentionPlan) -> Iterator[tuple[slice, slice, bool]]:
    """Runs of queries, the keys that they meet, and whether only those up to themselves."""
    for start, end in zip(plan.bounds, plan.bounds[1:], strict=False):
        yield slice(start, end), slice(start, end), True
    for prefix in plan.prefixes:
        yield slice(prefix.end, prefix.last), slice(prefix.first, prefix.end), False


def _shared(key_NKD: Tensor, query_NHD: Tensor) -> Tensor:
    """Key-value heads as query heads see them, in the dtype that scores are computed in."""
    wide = key_NKD.to(torch.promote_types(key_NKD.dtype, torch.float32))
    return wide.repeat_interleave(query_NHD.shape[1] // key_NKD.shape[1], 1)


def _summed(grad_NHD: Tensor, key_NKD: Tensor) -> Tensor:
    """Adds the gradients of query heads that share a key-value head."""
    return grad_NHD.unflatten(1, (key_NKD.shape[1], -1)).sum(2)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    shared = _shared(key, query)
    scores = torch.einsum("qhd,khd->hqk", query.to(shared.dtype), shared) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores
