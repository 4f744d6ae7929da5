"""The GPU kernel of :mod:`lightning_modules.kernels.cross_entropy_kl`, in Triton.

One program per token. Its first loop over the vocabulary keeps running maxima and sums (online softmax, arXiv
1805.02867), which give the cross-entropy and the KL. The second loop, whose logits are still in the cache, writes the
gradient.

Shapes in names: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _token_loss_kernel(
    LOGITS, TEACHER, LABELS, FIGURES, GRAD, width, vocabulary, stride, teacher_stride, ce_weight, grad_kl, inverse,
    HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    TEACHER += row * teacher_stride
    GRAD += row * width
    FIGURES += row * 3
    label = tl.load(LABELS + row)
    block = tl.arange(0, BLOCK)
    if label < 0:
        for start in range(0, width, BLOCK):
            tl.store(GRAD + start + block, tl.zeros([BLOCK], tl.float32), mask=start + block < width)
        for figure in tl.static_range(3):
            tl.store(FIGURES + figure, 0.0)
        return

    top, total, warm, best = float("-inf"), 0.0, 0.0, 0
    teacher_top, mass, cross = float("-inf"), 0.0, 0.0
    for start in range(0, width, BLOCK):
        c = start + block
        x = tl.load(LOGITS + c, mask=c < width, other=float("-inf")).to(tl.float32)
        highest = tl.max(x, 0)
        best = tl.where(highest > top, start + tl.argmax(x, 0), best)
        new = tl.maximum(top, highest)
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        if HAS_TEACHER:
            inside = c < vocabulary
            parts = tl.where(inside, tl.exp((x - new) * inverse), 0.0)
            warm = warm * tl.exp((top - new) * inverse) + tl.sum(parts, 0)
            y = tl.load(TEACHER + c, mask=inside, other=float("-inf")).to(tl.float32)
            teacher_new = tl.maximum(teacher_top, tl.max(y, 0))
            rescale = tl.exp((teacher_top - teacher_new) * inverse)
            parts = tl.where(inside, tl.exp((y - teacher_new) * inverse), 0.0)
            mass = mass * rescale + tl.sum(parts, 0)
            cross = cross * rescale + tl.sum(tl.where(inside, parts * (y - x) * inverse, 0.0), 0)
            teacher_top = teacher_new
        top = new

    ce = top + tl.log(total) - tl.load(LOGITS + label).to(tl.float32)
    tl.store(FIGURES, ce)
    if HAS_TEACHER:
        kl = cross / mass + (top - teacher_top) * inverse + tl.log(warm) - tl.log(mass)
        tl.store(FIGURES + 1, kl)
    else:
        tl.store(FIGURES + 1, 0.0)
    tl.store(FIGURES + 2, (best == label).to(tl.float32))

    for start in range(0, width, BLOCK):
        c = start + block
        x = tl.load(LOGITS + c, mask=c < width, other=float("-inf")).to(tl.float32)
        grad = ce_weight * (tl.exp(x - top) / total - tl.where(c == label, 1.0, 0.0))
        if HAS_TEACHER:
            inside = c < vocabulary
            y = tl.load(TEACHER + c, mask=inside, other=float("-inf")).to(tl.float32)
            difference = tl.exp((x - top) * inverse) / warm - tl.exp((y - teacher_top) * inverse) / mass
            grad += tl.where(inside, grad_kl * difference, 0.0)
        tl.store(GRAD + c, grad, mask=c < width)


def cross_entropy_kl(
    logits_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor | None, ce_weight: float, kl_weight: float, t: float
) -> tuple[Tensor, Tensor]:
    """Runs the kernel; see :func:`lightning_modules.kernels.cross_entropy_kl.cross_entropy_kl`."""
    tokens, width = logits_NV.shape
    figures_N3 = torch.empty(tokens, 3, dtype=torch.float32, device=logits_NV.device)
    grad_NV = torch.empty(tokens, width, dtype=torch.float32, device=logits_NV.device)
    if not tokens:
        return figures_N3, grad_NV
    logits_NV = logits_NV.contiguous()
    teacher = logits_NV if teacher_NV is None else teacher_NV.contiguous()
    _token_loss_kernel[(tokens,)](
        logits_NV, teacher, labels_N, figures_N3, grad_NV, width, min(width, teacher.shape[1]), width,
        teacher.shape[1], float(ce_weight), float(kl_weight / t), float(1 / t),
        HAS_TEACHER=teacher_NV is not None, BLOCK=min(2048, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip
    return figures_N3, grad_NV
