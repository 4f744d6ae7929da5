"""Cross-entropy and forward KL of logits; the gradient of the logits is computed in the same pass.

The reference computes in the precision of the logits, on any device. CUDA tensors in float32 use the Triton kernel of
:mod:`lightning_modules.kernels.cross_entropy_kl_triton`, which reads the logits twice and writes once; autograd over
torch's functions reads or writes them about ten times (cross-entropy) or forty times (KL).

Shapes in names: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from datamodules.batch import IGNORE_INDEX
from lightning_modules.kernels.dispatch import triton_on_cuda


@triton_on_cuda("lightning_modules.kernels.cross_entropy_kl_triton", dtypes=(torch.float32,))
def cross_entropy_kl(
    logits_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor | None, ce_weight: float, kl_weight: float, t: float
) -> tuple[Tensor, Tensor]:
    """Computes CE and KL(teacher || student) per token, and the gradient of ``ce_weight CE + kl_weight KL``.

    Args:
        logits_NV: of the student, float32 or float64.
        labels_N: tokens with the label -100 contribute nothing.
        teacher_NV: logits of the teacher, None for no KL; the KL ignores columns that only one of the two has.
        ce_weight: of the cross-entropy.
        kl_weight: of the KL between the softmaxes of logits divided by ``t``.
        t: temperature.

    Returns:
        Cross-entropy, KL and whether the label has the highest logit [N, 3]; the gradient of the weighted sum [N, V].
    """
    supervised_N1 = (labels_N != IGNORE_INDEX)[:, None]
    labels_N1 = labels_N.clamp(min=0)[:, None]
    log_probs_NV = logits_NV.log_softmax(dim=-1)
    ce_N1 = -log_probs_NV.gather(1, labels_N1)
    grad_NV = log_probs_NV.exp_().scatter_add_(1, labels_N1, -torch.ones_like(ce_N1)).mul_(ce_weight)
    kl_N1 = torch.zeros_like(ce_N1)
    if teacher_NV is not None:
        width = min(logits_NV.shape[1], teacher_NV.shape[1])
        student, teacher = ((x[:, :width] / t).log_softmax(dim=-1) for x in (logits_NV, teacher_NV.to(logits_NV)))
        probs = teacher.exp()
        kl_N1 = (probs * (teacher - student)).sum(dim=-1, keepdim=True)
        grad_NV[:, :width] += (student.exp_() - probs) * (kl_weight / t)
    correct_N1 = logits_NV.argmax(dim=-1, keepdim=True) == labels_N[:, None]
    figures_N3 = torch.cat([ce_N1, kl_N1, correct_N1.to(ce_N1)], dim=1)
    return torch.where(supervised_N1, figures_N3, 0), torch.where(supervised_N1, grad_NV, 0)


class CrossEntropyKL(torch.autograd.Function):
    """Sums of :func:`cross_entropy_kl` over tokens: weighted loss, number of correct labels, cross-entropy, KL."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        teacher_NV: Tensor | None,
        ce_weight: float,
        kl_weight: float,
        t: float,
    ) -> tuple[Tensor, ...]:
        """Computes the sums; the arguments are those of :func:`cross_entropy_kl`."""
        figures_N3, grad_NV = cross_entropy_kl(logits_NV, labels_N, teacher_NV, ce_weight, kl_weight, t)
        ctx.save_for_backward(grad_NV)
        ce, kl, correct = figures_N3.sum(dim=0).unbind()
        loss = ce_weight * ce + kl_weight * kl
        ctx.mark_non_differentiable(correct, ce, kl)
        return loss, correct, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None, None]:
        """Scales the gradient that the forward pass computed."""
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * grad, None, None, None, None, None
