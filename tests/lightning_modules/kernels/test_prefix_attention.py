"""Attention over packed rows against the batch contract's dense mask, in plain torch and as kernels."""

import numpy as np
import pytest
import torch

from lightning_modules.kernels.attention_plan import build_attention_plan
from lightning_modules.kernels.prefix_attention import attend, attend_backward


def rows(*layouts, tokens):
    """Segment ids of rows given as lists of (segment id, length), padded to ``tokens``."""
    ids = torch.full((len(layouts), tokens), -1)
    for row, layout in enumerate(layouts):
        start = 0
        for segment, length in layout:
            ids[row, start : start + length] = segment
            start += length
    return ids


def dense(query, key, value, segment_ids, scale):
    """The batch contract's rule as a T x T mask, row by row."""
    outs = []
    batch, tokens = segment_ids.shape
    for row in range(batch):
        part = slice(row * tokens, (row + 1) * tokens)
        q, k, v = query[part], key[part], value[part]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        seg = segment_ids[row]
        place = torch.arange(tokens)
        mask = (place[:, None] >= place[None]) & ((seg[:, None] == seg[None]) | ((seg[None] == 0) & (seg[:, None] > 0)))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v))
    return torch.cat(outs)


LAYOUTS = {
    "one example": ([[(1, 37)]], 37),
    "packed": ([[(1, 5), (2, 1), (3, 20)], [(1, 26)]], 29),
    "prefix": ([[(0, 7), (1, 5), (2, 13), (3, 1)]], 31),
    "two rows, one with a prefix": ([[(0, 3), (1, 40)], [(1, 11), (2, 17)]], 43),
    "a row of padding": ([[(0, 9), (1, 3)], []], 12),
    "blocks of keys and sums of queries": ([[(0, 70), (1, 90), (2, 5), (3, 521)], [(1, 300), (2, 386)]], 700),
}


def check(layout, heads, shared, width, device, dtype, tolerance):
    """Value and gradients of one buffer of queries, keys and values, against float64."""
    ids = rows(*LAYOUTS[layout][0], tokens=LAYOUTS[layout][1])
    count, scale = ids.numel(), width**-0.5

    def split(buffer):
        return buffer.unflatten(-1, (-1, width)).split([heads, shared, shared], 1)

    exact = torch.randn(count, (heads + 2 * shared) * width, dtype=torch.float64).to(dtype).double().requires_grad_()
    real = (ids.reshape(-1) >= 0)[:, None, None]
    grad = torch.randn(count, heads, width, dtype=torch.float64) * real
    expected = dense(*split(exact), ids, scale)
    (expected * grad).sum().backward()
    plan = build_attention_plan(ids, heads // shared).to(device)
    buffer = exact.detach().to(device, dtype)
    out, lse = attend(*split(buffer), plan, scale)
    got = torch.full_like(buffer, float("nan"))  # every gradient is written, padding's too
    attend_backward(grad.to(device, dtype), split(buffer), out, lse, plan, scale, split(got))
    for mine, theirs in ((out.cpu().double() * real, expected.detach() * real), (got.cpu().double(), exact.grad)):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 10), (6, 2, 10), (3, 1, 7)])
def test_equals_the_dense_mask_in_value_and_gradients(layout, heads, shared, width):
    check(layout, heads, shared, width, "cpu", torch.float64, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (3, 1), (2, 2)])
def test_kernels_in_the_interpreter_equal_the_dense_mask(layout, heads, shared, monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the GPU's own tests run the kernels")
    from lightning_modules.kernels import prefix_attention, prefix_attention_triton

    monkeypatch.setattr(prefix_attention, "kernels_for", lambda tensor: prefix_attention_triton)
    check(layout, heads, shared, 16, "cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "shared", "width"), [(8, 2, 128), (9, 3, 64), (4, 4, 128), (16, 1, 64)])
def test_kernels_equal_the_dense_mask(layout, heads, shared, width, dtype):
    check(layout, heads, shared, width, "cuda", dtype, 1e-2)


@pytest.mark.parametrize("group", [1, 3, 4, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tables_cover_every_allowed_pair_once(layout, group):
    ids = rows(*LAYOUTS[layout][0], tokens=LAYOUTS[layout][1])
    tables = build_attention_plan(ids, group).tables
    flat, tokens = ids.reshape(-1).numpy(), ids.shape[1]
    place = np.arange(len(flat))
    same_row = place[:, None] // tokens == place // tokens
    allowed = (place[:, None] >= place) & same_row & (
        (flat[:, None] == flat) & (flat >= 0) | (flat == 0) & (flat[:, None] > 0)
    )  # fmt: skip
    allowed |= np.eye(len(flat), dtype=bool)  # padding meets itself
    starts, prefix = tables.starts_N.numpy(), tables.prefix_N.numpy()
    own = (place >= starts[:, None]) & (place <= place[:, None])
    before = (place < prefix[:, None]) & (place >= (place // tokens * tokens)[:, None])
    by_queries, by_keys = np.zeros_like(allowed, int), np.zeros_like(allowed, int)
    for first, last, key, prefix_first, prefix_last in tables.queries.numpy():
        by_queries[first:last, key:last] += own[first:last, key:last]
        by_queries[first:last, prefix_first:prefix_last] += before[first:last, prefix_first:prefix_last]
    for first, last, query, query_last, slot in tables.keys.numpy():
        kind = own if slot < 0 else before
        by_keys[query:query_last, first:last] += kind[query:query_last, first:last]
    assert (by_queries == allowed).all()
    assert (by_keys == allowed).all()


def test_plan_reads_the_segments():
    plan = build_attention_plan(rows([(0, 7), (1, 5), (2, 13)], [(1, 20)], tokens=30), 4)
    assert plan.bounds == (0, 7, 12, 25, 30, 50, 60)
    assert plan.longest == 27
    (prefix,) = plan.prefixes
    assert (prefix.first, prefix.end, prefix.last) == (0, 7, 25)
