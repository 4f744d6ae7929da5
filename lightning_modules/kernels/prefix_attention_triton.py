"""Triton kernels of attention over packed rows with a shared prefix, in one pass.

A query attends to the keys of its own segment up to itself and, after a prefix, to the whole prefix. So a block of
queries loops over two runs of keys and no others, whatever the length of the row. The host computes the runs
(:mod:`lightning_modules.kernels.attention_plan`), so that nothing waits for the device and nothing is compiled again.
Query heads that share a key-value head are rows of one tile: a key is loaded once for all of them. A block spans few
tokens, so that little of the computed scores is masked.

The backward pass loops over queries for a block of keys. For the keys of the prefix, one multiprocessor would have to
add the gradients of every query of their row; instead runs of ``CHUNK`` queries give partial sums, which are added in a
fixed order, so that the result does not depend on timing.

The recurrences are those of Dao, "FlashAttention-2", arXiv 2307.08691; the loop over segments and the split of the
prefix are specific to this project.

Shapes in names: N tokens of all rows, concatenated, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_modules.kernels.attention_plan import CHUNK, KEYS, AttentionPlan, query_tokens

MASKED = tl.constexpr(-1e30)  #: score of a masked pair; not infinity, whose difference to itself is NaN
LOG2E = 1.4426950408889634

#: compile options of each kernel: the fastest of those tried on one H100
FORWARD = {"num_warps": 8, "num_stages": 3}
BACKWARD_QUERIES = {"num_warps": 8, "num_stages": 3}
BACKWARD_KEYS = {"num_warps": 4, "num_stages": 3}
BACKWARD_ROWS = 32  #: queries times heads of a tile of the backward kernel over keys
#: bytes of shared memory per block that BACKWARD_QUERIES needs (heads of 128); two stages need 96 KiB, as a GeForce has
SHARED_MEMORY = 160 << 10


@triton.jit
def _load(POINTER, token, head, stride, keep, D: tl.constexpr):
    at = token.to(tl.int64) * stride + head * D
    return tl.load(POINTER + at[:, None] + tl.arange(0, D)[None, :], mask=keep[:, None], other=0.0)


@triton.jit
def _attend(q, K, V, key, last, keep, head, stride, out, most, total, scale, D: tl.constexpr):
    k = _load(K, key, head, stride, key < last, D)
    v = _load(V, key, head, stride, key < last, D)
    scores = tl.where(keep, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, MASKED)
    new = tl.maximum(most, tl.max(scores, 1))
    old = tl.exp2(most - new)
    weights = tl.exp2(scores - new[:, None])
    out = out * old[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return out, new, total * old + tl.sum(weights, 1)


@triton.jit
def _forward_kernel(
    Q, K, V, OUT, LSE, STARTS, PREFIX, BLOCKS, tokens, q_stride, kv_stride, out_stride, scale,
    GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    kv_head, block = tl.program_id(0), BLOCKS + tl.program_id(1) * 5
    first, last, own = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    token, member = first + tl.arange(0, M) // PADDED, tl.arange(0, M) % PADDED
    head, real = kv_head * GROUP + member, (token < last) & (member < GROUP)
    start = tl.load(STARTS + token, mask=real, other=0)
    prefix = tl.load(PREFIX + token, mask=real, other=0)
    q = _load(Q, token, head, q_stride, real, D)
    out = tl.zeros([M, D], tl.float32)
    most = tl.full([M], MASKED, tl.float32)
    total = tl.zeros([M], tl.float32)
    prefix_first, prefix_last = tl.load(block + 3), tl.load(block + 4)
    for at in range(prefix_first, prefix_last, KEYS):
        key = at + tl.arange(0, KEYS)
        keep = key[None, :] < prefix[:, None]
        out, most, total = _attend(q, K, V, key, prefix_last, keep, kv_head, kv_stride, out, most, total, scale, D)
    for at in range(own, last, KEYS):
        key = at + tl.arange(0, KEYS)
        keep = (key[None, :] >= start[:, None]) & (key[None, :] <= token[:, None])
        out, most, total = _attend(q, K, V, key, last, keep, kv_head, kv_stride, out, most, total, scale, D)
    out = out / total[:, None]
    out_at = token.to(tl.int64) * out_stride + head * D
    tl.store(OUT + out_at[:, None] + tl.arange(0, D)[None, :], out.to(OUT.dtype.element_ty), mask=real[:, None])
    tl.store(LSE + head * tokens + token, most + tl.log2(total), mask=real)


@triton.jit
def _grad_scores(q, grad, lse, delta, K, V, key, last, keep, head, stride, scale, D: tl.constexpr):
    k = _load(K, key, head, stride, key < last, D)
    v = _load(V, key, head, stride, key < last, D)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    weights = tl.where(keep, tl.exp2(scores - lse[:, None]), 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, input_precision="ieee")


@triton.jit
def _backward_queries_kernel(
    Q, K, V, OUT, GRAD, LSE, DELTA, GRAD_Q, STARTS, PREFIX, BLOCKS,
    tokens, q_stride, kv_stride, out_stride, grad_stride, scale, factor,
    GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    kv_head, block = tl.program_id(0), BLOCKS + tl.program_id(1) * 5
    first, last, own = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    token, member = first + tl.arange(0, M) // PADDED, tl.arange(0, M) % PADDED
    head, real = kv_head * GROUP + member, (token < last) & (member < GROUP)
    start = tl.load(STARTS + token, mask=real, other=0)
    prefix = tl.load(PREFIX + token, mask=real, other=0)
    q = _load(Q, token, head, q_stride, real, D)
    grad = _load(GRAD, token, head, out_stride, real, D)
    out = _load(OUT, token, head, out_stride, real, D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + head * tokens + token, delta, mask=real)
    lse = tl.load(LSE + head * tokens + token, mask=real, other=0.0)
    grad_q = tl.zeros([M, D], tl.float32)
    prefix_first, prefix_last = tl.load(block + 3), tl.load(block + 4)
    for at in range(prefix_first, prefix_last, KEYS):
        key = at + tl.arange(0, KEYS)
        keep = key[None, :] < prefix[:, None]
        grad_q += _grad_scores(q, grad, lse, delta, K, V, key, prefix_last, keep, kv_head, kv_stride, scale, D)
    for at in range(own, last, KEYS):
        key = at + tl.arange(0, KEYS)
        keep = (key[None, :] >= start[:, None]) & (key[None, :] <= token[:, None])
        grad_q += _grad_scores(q, grad, lse, delta, K, V, key, last, keep, kv_head, kv_stride, scale, D)
    grad_at = token.to(tl.int64) * grad_stride + head * D
    grad_q = (grad_q * factor).to(GRAD_Q.dtype.element_ty)
    tl.store(GRAD_Q + grad_at[:, None] + tl.arange(0, D)[None, :], grad_q, mask=real[:, None])


@triton.jit
def _backward_keys_kernel(
    Q, K, V, GRAD, LSE, DELTA, GRAD_K, GRAD_V, PARTIAL_K, PARTIAL_V, STARTS, PREFIX, TASKS,
    tokens, q_stride, kv_stride, out_stride, grad_stride, scale, factor,
    GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    kv_head, task = tl.program_id(0), TASKS + tl.program_id(1) * 5
    first, last, slot = tl.load(task), tl.load(task + 1), tl.load(task + 4)
    key = first + tl.arange(0, KEYS)
    k = _load(K, key, kv_head, kv_stride, key < last, D)
    v = _load(V, key, kv_head, kv_stride, key < last, D)
    grad_k, grad_v = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, D], tl.float32)
    query_last = tl.load(task + 3)
    for query in range(tl.load(task + 2), query_last, M // PADDED):
        token, member = query + tl.arange(0, M) // PADDED, tl.arange(0, M) % PADDED
        head, real = kv_head * GROUP + member, (token < query_last) & (member < GROUP)
        start = tl.load(STARTS + token, mask=real, other=0)
        prefix = tl.load(PREFIX + token, mask=real, other=0)
        q = _load(Q, token, head, q_stride, real, D)
        grad = _load(GRAD, token, head, out_stride, real, D)
        lse = tl.load(LSE + head * tokens + token, mask=real, other=0.0)
        delta = tl.load(DELTA + head * tokens + token, mask=real, other=0.0)
        own = (key[:, None] >= start[None, :]) & (key[:, None] <= token[None, :])
        keep = tl.where(slot < 0, own, key[:, None] < prefix[None, :]) & real[None, :] & (key < last)[:, None]
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        weights = tl.where(keep, tl.exp2(scores - lse[None, :]), 0.0)
        grad_v += tl.dot(weights.to(grad.dtype), grad, input_precision="ieee")
        grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_k += tl.dot(grad_scores.to(q.dtype), q, input_precision="ieee")
    grad_k *= factor
    d = tl.arange(0, D)[None, :]
    if slot < 0:
        own_at = key.to(tl.int64)[:, None] * grad_stride + kv_head * D + d
        tl.store(GRAD_K + own_at, grad_k.to(GRAD_K.dtype.element_ty), mask=(key < last)[:, None])
        tl.store(GRAD_V + own_at, grad_v.to(GRAD_V.dtype.element_ty), mask=(key < last)[:, None])
    else:
        slot_at = ((slot.to(tl.int64) * KEYS + tl.arange(0, KEYS)[:, None]) * tl.num_programs(0) + kv_head) * D + d
        tl.store(PARTIAL_K + slot_at, grad_k)
        tl.store(PARTIAL_V + slot_at, grad_v)


def attend(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Runs the forward kernel; see :func:`lightning_modules.kernels.prefix_attention.attend`.

    Args:
        query_NHD: the heads of a token are contiguous; tokens may be strided (a view of a wider buffer).
        key_NKD: likewise, with the stride of ``value_NKD``.
        value_NKD: values.
        plan: on the same device.
        scale: factor of the scores.

    Returns:
        out_NHD, and the base-2 log-sum-exp of the scores of each query [H, N] in fp32.
    """
    tables = plan.tables
    tokens, heads, width = query_NHD.shape
    out_NHD = torch.empty(query_NHD.shape, dtype=query_NHD.dtype, device=query_NHD.device)
    lse_HN = torch.empty(heads, tokens, dtype=torch.float32, device=query_NHD.device)
    grid = (key_NKD.shape[1], len(tables.queries))
    _forward_kernel[grid](
        query_NHD, key_NKD, value_NKD, out_NHD, lse_HN, tables.starts_N, tables.prefix_N, tables.queries, tokens,
        query_NHD.stride(0), key_NKD.stride(0), heads * width, scale * LOG2E, **_tile(query_NHD, key_NKD), **FORWARD,
    )  # fmt: skip
    return out_NHD, lse_HN


def attend_backward(
    grad_NHD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out_NHD: Tensor,
    lse_HN: Tensor,
    plan: AttentionPlan,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of the inputs; see :func:`lightning_modules.kernels.prefix_attention.attend_backward`.

    Args:
        grad_NHD: gradient of the output.
        inputs: queries, keys and values.
        out_NHD: output of :func:`attend`.
        lse_HN: log-sum-exp of :func:`attend`.
        plan: on the same device.
        scale: factor of the scores.
        grads: tensors to write to; those of keys and values have the same strides.
    """
    grad_NHD = grad_NHD.contiguous()
    query_NHD, key_NKD, value_NKD = inputs
    tokens, heads, width = query_NHD.shape
    shared = key_NKD.shape[1]
    grad_query, grad_key, grad_value = grads
    tables, delta_HN = plan.tables, torch.empty_like(lse_HN)
    sizes = [(triton.cdiv(p.end - p.first, KEYS), triton.cdiv(p.last - p.end, CHUNK)) for p in plan.prefixes]
    slots = sum(blocks * chunks for blocks, chunks in sizes)
    partial = torch.empty(2, slots, KEYS, shared, width, dtype=torch.float32, device=query_NHD.device)
    strides = (tokens, query_NHD.stride(0), key_NKD.stride(0), heads * width)
    shape, factors = _tile(query_NHD, key_NKD), (scale * LOG2E, scale)
    _backward_queries_kernel[(shared, len(tables.queries))](
        query_NHD, key_NKD, value_NKD, out_NHD, grad_NHD, lse_HN, delta_HN, grad_query,
        tables.starts_N, tables.prefix_N, tables.queries, *strides, grad_query.stride(0), *factors,
        **shape, **_fit_stages(BACKWARD_QUERIES),
    )  # fmt: skip
    _backward_keys_kernel[(shared, len(tables.keys))](
        query_NHD, key_NKD, value_NKD, grad_NHD, lse_HN, delta_HN, grad_key, grad_value, partial[0], partial[1],
        tables.starts_N, tables.prefix_N, tables.keys, *strides, grad_key.stride(0), *factors,
        **shape | {"M": max(16, BACKWARD_ROWS, shape["PADDED"])}, **BACKWARD_KEYS,
    )  # fmt: skip
    for prefix, sums in zip(plan.prefixes, partial.split([b * c for b, c in sizes], 1), strict=True):
        length, blocks = prefix.end - prefix.first, triton.cdiv(prefix.end - prefix.first, KEYS)
        both = sums.view(2, -1, blocks * KEYS, shared, width).sum(1)[:, :length]
        grad_key[prefix.first : prefix.end] += both[0].to(grad_key.dtype)
        grad_value[prefix.first : prefix.end] += both[1].to(grad_value.dtype)


@cache
def _has_little_shared_memory() -> bool:
    properties = torch.cuda.get_device_properties()
    return bool(getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY) < SHARED_MEMORY)


def _fit_stages(options: dict[str, int]) -> dict[str, int]:
    return options | {"num_stages": 2} if torch.cuda.is_available() and _has_little_shared_memory() else options


def _tile(query_NHD: Tensor, key_NKD: Tensor) -> dict[str, Any]:
    group = query_NHD.shape[1] // key_NKD.shape[1]
    padded = triton.next_power_of_2(group)
    rows = query_tokens(group) * padded
    return {"GROUP": group, "PADDED": padded, "D": query_NHD.shape[2], "M": rows, "KEYS": KEYS}
