import math

import pytest
import torch

from lightning_modules.packed_attention import packed_attention, plan_segments


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
    "shorter than the chunks": ([[(0, 9), (1, 3)]], 12),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_equals_the_dense_mask_in_value_and_gradients(layout, heads, shared):
    ids = rows(*LAYOUTS[layout][0], tokens=LAYOUTS[layout][1])
    count, width = ids.numel(), 10
    inputs = [torch.randn(count, h, width, dtype=torch.float64, requires_grad=True) for h in (heads, shared, shared)]
    real = (ids.reshape(-1) >= 0)[:, None, None]
    weight = torch.randn(count, heads, width, dtype=torch.float64) * real
    scale = 1 / math.sqrt(width)
    expected = dense(*inputs, ids, scale)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    got = packed_attention(*inputs, plan_segments(ids), scale)
    got_grads = torch.autograd.grad((got * weight).sum(), inputs)
    torch.testing.assert_close(got * real, expected * real)
    for a, b in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_plan_counts_every_token_once():
    ids = rows([(0, 7), (1, 5), (2, 13)], [(1, 20)], tokens=30)
    plan = plan_segments(ids, chunks=4)
    assert plan.cu_segments.tolist() == [0, 7, 12, 25, 30, 50, 60]
    assert plan.longest == 20
    (prefix,) = plan.prefixes
    assert (prefix.start, prefix.length, prefix.end) == (0, 7, 25)
    assert prefix.cu_queries[-1] == 18 and prefix.cu_keys.tolist() == [0, 7, 14, 21, 28]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash_kernels_equal_the_dense_mask(layout):
    ids = rows(*LAYOUTS[layout][0], tokens=LAYOUTS[layout][1])
    count, real = ids.numel(), (ids.reshape(-1) >= 0)[:, None, None]
    exact = [torch.randn(count, h, 128, dtype=torch.float64, requires_grad=True) for h in (8, 2, 2)]
    weight = torch.randn(count, 8, 128, dtype=torch.float64) * real
    expected = dense(*exact, ids, 128**-0.5)
    expected_grads = torch.autograd.grad((expected * weight).sum(), exact)
    inputs = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    got = packed_attention(*inputs, plan_segments(ids).to("cuda"), 128**-0.5)
    got_grads = torch.autograd.grad((got * weight.to(got)).sum(), inputs)
    for a, b in zip((got * real.cuda(), *got_grads), (expected * real, *expected_grads), strict=True):
        error = (a.cpu().double() - b).norm() / b.norm()
        assert error < 1e-2
