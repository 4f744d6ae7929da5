"""Attention over packed rows with a shared prefix: Triton kernels on CUDA, a PyTorch reference on other devices.

Shapes in names: N tokens of all rows, concatenated, H query heads, K key-value heads, D head width.

A token attends to its own segment up to itself and, after a prefix, to the whole prefix
(:mod:`lightning_modules.kernels.attention_plan`). In the reference, each run of keys gives a partial output and its
log-sum-exp, and two are merged exactly::

    lse = logaddexp(lse_a, lse_b);   out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)

The backward pass needs no merging: with P = exp(S - lse) and rowsum(dO * O) of the *merged* output, each run gives its
exact share of the gradients (the identity that ring attention uses, Liu et al., arXiv 2310.01889, sec. 3).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_modules.kernels.attention_plan import AttentionPlan
from lightning_modules.kernels.dispatch import triton_on_cuda

TRITON = "lightning_modules.kernels.prefix_attention_triton"
Inputs = tuple[Tensor, Tensor, Tensor]  #: queries, keys and values


@triton_on_cuda(TRITON)
def attend(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Computes attention within segments and to the prefix; keys and values of grouped queries are not repeated.

    Args:
        query_NHD: queries with rotary positions applied; 16-bit on CUDA, any float type on other devices. The heads of
            a token are contiguous; tokens may be strided, as in a view of one buffer for queries, keys and values.
        key_NKD: keys with rotary positions applied, H a multiple of K.
        value_NKD: values.
        plan: from :func:`lightning_modules.kernels.attention_plan.build_attention_plan`, on the same device.
        scale: factor of the scores, usually 1/sqrt(D).

    Returns:
        out_NHD in the dtype of the queries, and the log-sum-exp of the scores [H, N] for :func:`attend_backward`, in
        the base that the implementation uses. The output at padding is unspecified.
    """
    wide = torch.promote_types(query_NHD.dtype, torch.float32)
    out = torch.zeros(query_NHD.shape, dtype=wide)
    lse_HN = torch.full(query_NHD.shape[1::-1], float("-inf"), dtype=wide)
    for queries, keys, causal in _runs(plan):
        scores = _scores(query_NHD[queries], key_NKD[keys], causal, scale)
        part_lse = scores.logsumexp(-1)
        weights, value = (scores - part_lse[..., None]).exp(), _repeated(value_NKD[keys], query_NHD)
        merged = torch.logaddexp(lse_HN[:, queries], part_lse)
        new, old = ((lse - merged).exp().T[..., None] for lse in (part_lse, lse_HN[:, queries]))
        out[queries] = out[queries] * old + torch.einsum("hqk,khd->qhd", weights, value) * new
        lse_HN[:, queries] = merged
    return out.to(query_NHD.dtype), lse_HN


@triton_on_cuda(TRITON)
def attend_backward(
    grad_NHD: Tensor, inputs: Inputs, out_NHD: Tensor, lse_HN: Tensor, plan: AttentionPlan, scale: float, grads: Inputs
) -> None:
    """Writes the gradients of queries, keys and values into ``grads``.

    Args:
        grad_NHD: gradient of the output.
        inputs: queries, keys and values, as given to :func:`attend`.
        out_NHD: output of :func:`attend`.
        lse_HN: log-sum-exp of :func:`attend`.
        plan: of the segments.
        scale: factor of the scores.
        grads: tensors to write to; they may be strided as the inputs.
    """
    query_NHD, key_NKD, value_NKD = inputs
    sums = [torch.zeros(tensor.shape, dtype=lse_HN.dtype) for tensor in grads]
    delta_HN = (grad_NHD.to(lse_HN.dtype) * out_NHD).sum(-1).T
    for queries, keys, causal in _runs(plan):
        query, grad = query_NHD[queries], grad_NHD[queries].to(lse_HN.dtype)
        key, value = (_repeated(tensor[keys], query_NHD) for tensor in (key_NKD, value_NKD))
        weights = (_scores(query, key_NKD[keys], causal, scale) - lse_HN[:, queries, None]).exp()
        grad_scores = weights * (torch.einsum("qhd,khd->hqk", grad, value) - delta_HN[:, queries, None]) * scale
        sums[0][queries] += torch.einsum("hqk,khd->qhd", grad_scores, key)
        sums[1][keys] += _summed(torch.einsum("hqk,qhd->khd", grad_scores, query.to(key.dtype)), key_NKD)
        sums[2][keys] += _summed(torch.einsum("hqk,qhd->khd", weights, grad), value_NKD)
    for target, total in zip(grads, sums, strict=True):
        target.copy_(total)


def _runs(plan: AttentionPlan) -> Iterator[tuple[slice, slice, bool]]:
    """Yields runs of queries, the run of keys that each attends to, and whether a causal mask applies."""
    for start, end in zip(plan.bounds, plan.bounds[1:], strict=False):
        yield slice(start, end), slice(start, end), True
    for prefix in plan.prefixes:
        yield slice(prefix.end, prefix.last), slice(prefix.first, prefix.end), False


def _repeated(key_NKD: Tensor, query_NHD: Tensor) -> Tensor:
    """Repeats key-value heads for their query heads, in the dtype in which scores are computed."""
    wide = key_NKD.to(torch.promote_types(key_NKD.dtype, torch.float32))
    return wide.repeat_interleave(query_NHD.shape[1] // key_NKD.shape[1], 1)


def _summed(grad_NHD: Tensor, key_NKD: Tensor) -> Tensor:
    """Sums the gradients over the query heads that share a key-value head."""
    return grad_NHD.unflatten(1, (key_NKD.shape[1], -1)).sum(2)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    repeated = _repeated(key, query)
    scores = torch.einsum("qhd,khd->hqk", query.to(repeated.dtype), repeated) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores
