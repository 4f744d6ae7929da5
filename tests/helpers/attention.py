"""Attention over packed rows with a dense mask in float64, to which implementations are compared."""

import torch

from lightning_modules.kernels.attention_plan import build_attention_plan
from tests.helpers.packed_rows import dense_mask, layout_ids


def dense_attention(query, key, value, segments_BT, scale):
    """Attention of [N, H, D] queries with the dense mask, row by row."""
    outputs = []
    rows, tokens = segments_BT.shape
    masks = dense_mask(segments_BT)
    for row in range(rows):
        part = slice(row * tokens, (row + 1) * tokens)
        q, k, v = query[part], key[part], value[part]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~masks[row], float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


def check_attention(functions, layout, shape, device, dtype, tolerance, strided_gradient=False):
    """Compares output and gradients, for one buffer of queries, keys and values, with float64.

    Args:
        functions: ``attend`` and ``attend_backward``.
        layout: name of segments.
        shape: query heads, key-value heads, head width.
        device: of the tensors of the functions.
        dtype: of the same.
        tolerance: largest relative distance of norms.
        strided_gradient: whether the gradient of the output is not contiguous.
    """
    attend, attend_backward = functions
    heads, shared, width = shape
    ids = layout_ids(layout)
    count, scale = ids.numel(), width**-0.5

    def split(buffer):
        return buffer.unflatten(-1, (-1, width)).split([heads, shared, shared], 1)

    exact = torch.randn(count, (heads + 2 * shared) * width, dtype=torch.float64).to(dtype).double().requires_grad_()
    real = (ids.reshape(-1) >= 0)[:, None, None]
    grad = torch.randn(count, heads, width, dtype=torch.float64) * real
    expected = dense_attention(*split(exact), ids, scale)
    (expected * grad).sum().backward()
    plan = build_attention_plan(ids, heads // shared).to(device)
    buffer = exact.detach().to(device, dtype)
    out, lse = attend(*split(buffer), plan, scale)
    got = torch.full_like(buffer, float("nan"))  # every gradient must be written, also that of padding
    grad = grad.to(device, dtype)
    if strided_gradient:
        grad = torch.stack([grad, torch.full_like(grad, float("nan"))], -1)[..., 0]
    attend_backward(grad, split(buffer), out, lse, plan, scale, split(got))
    pairs = ((out.cpu().double() * real, expected.detach() * real), (got.cpu().double(), exact.grad))
    for actual, reference in pairs:
        assert (actual - reference).norm() <= tolerance * reference.norm()
