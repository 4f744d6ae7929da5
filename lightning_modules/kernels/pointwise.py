"""The inexpensive operations of a decoder block: norms, SwiGLU, rotary positions, rows quantized to FP8.

These functions are PyTorch references. On CUDA tensors they run the Triton kernels of
:mod:`lightning_modules.kernels.pointwise_triton`, which are tested against them. On a CPU they run uncompiled, since
compilation would take minutes there.

Shapes in names: N tokens, C channels, O and I outer and inner channels of the MLP, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.kernels.dispatch import triton_on_cuda

TRITON = "lightning_modules.kernels.pointwise_triton"


@triton_on_cuda(TRITON)
def rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Computes x / rms(x) * weight, in the dtype of x."""
    wide = _at_least_float32(x_NC)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_NC.dtype) * weight_C


@triton_on_cuda(TRITON)
def rms_norm_backward(
    x_NC: Tensor, weight_C: Tensor, eps: float, grad_NC: Tensor, residual_NC: Tensor | None
) -> Tensor:
    """Computes the gradient of x, plus the gradient of the residual stream if one is given."""
    wide = _at_least_float32(x_NC)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * inverse
    grad = _at_least_float32(grad_NC) * _at_least_float32(weight_C)
    grad = inverse * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return (grad if residual_NC is None else grad + residual_NC).to(x_NC.dtype)


@triton_on_cuda(TRITON)
def swiglu(gate_up_NO: Tensor) -> Tensor:
    """Computes silu(gate) * up: [N, 2 I] -> [N, I]."""
    gate, up = gate_up_NO.chunk(2, -1)
    return (nn.functional.silu(_at_least_float32(gate)) * up).to(gate.dtype)


@triton_on_cuda(TRITON)
def swiglu_backward(gate_up_NO: Tensor, grad_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the gradients of gate and up [N, 2 I], and recomputes the output of SwiGLU [N, I]."""
    gate, up = (_at_least_float32(x) for x in gate_up_NO.chunk(2, -1))
    sigmoid = torch.sigmoid(gate)
    silu, wide = gate * sigmoid, _at_least_float32(grad_NI)
    grad_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, wide * silu], -1).to(grad_NI.dtype), (silu * up).to(grad_NI.dtype)


@triton_on_cuda(TRITON)
def rotate_(y_NO: Tensor, cos_ND: Tensor, sin_ND: Tensor, heads: int, back: bool = False) -> Tensor:
    """Applies rotary positions in place to the first ``heads`` heads of each row; ``back`` reverses it."""
    rotated = y_NO[:, : heads * cos_ND.shape[-1]].unflatten(-1, (heads, -1))
    cos, sin = cos_ND.to(y_NO.dtype)[:, None], sin_ND.to(y_NO.dtype)[:, None]
    first, second = rotated.chunk(2, -1)
    crossed = torch.cat([-second, first], -1)
    rotated.copy_(rotated * cos + crossed * (-sin if back else sin))
    return y_NO


@triton_on_cuda(TRITON)
def quantize_rows(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes rows to e4m3.

    Returns:
        e4m3 numbers [N, C] and the scale of each row [N, 1] in fp32; the largest number of a row becomes 448.
    """
    wide = x_NC.float()
    scale_N1 = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448.0
    return (wide / scale_N1).to(torch.float8_e4m3fn), scale_N1


def _at_least_float32(x: Tensor) -> Tensor:
    """Converts to fp32 or wider: norms and SwiGLU are computed there, as in the modules of transformers."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
