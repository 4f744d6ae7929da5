"""Pointwise and row-wise GPU kernels of a decoder block, in Triton.

Each is bound by memory: it reads its inputs once and writes its outputs once. Sums, norms and SwiGLU are computed in
fp32, as in the modules of transformers. :mod:`lightning_modules.kernels.pointwise` has the references for other
devices and selects between the two. Tests compare each kernel with its reference in Triton's interpreter, which needs
no GPU.

Shapes in names: N tokens, C channels, I inner channels of the MLP, H heads that are rotated, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn


def _warps(block: int) -> int:
    return min(16, max(4, block // 1024))


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm_kernel(X, WEIGHT, Y, channels, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * channels
    c = tl.arange(0, BLOCK)
    keep = c < channels
    x = tl.load(X + row + c, mask=keep, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + c, mask=keep, other=0.0)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / channels + eps)
    normed = normed.to(Y.dtype.element_ty)  # rounded before the weight is applied, as in transformers
    tl.store(Y + row + c, (normed.to(tl.float32) * weight.to(tl.float32)).to(Y.dtype.element_ty), mask=keep)


def rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Computes x / rms(x) * weight, in the dtype of x."""
    y_NC = torch.empty_like(x_NC)
    tokens, channels = x_NC.shape
    block = triton.next_power_of_2(channels)
    _rms_norm_kernel[(tokens,)](x_NC, weight_C, y_NC, channels, eps, BLOCK=block, num_warps=_warps(block))
    return y_NC


@triton.jit
def _rms_norm_backward_kernel(
    X, WEIGHT, GRAD, RESIDUAL, OUT, channels, eps, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * channels
    c = tl.arange(0, BLOCK)
    keep = c < channels
    x = tl.load(X + row + c, mask=keep, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + row + c, mask=keep, other=0.0).to(tl.float32)
    grad *= tl.load(WEIGHT + c, mask=keep, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / channels + eps)
    normed = x * inverse
    out = inverse * (grad - normed * (tl.sum(grad * normed, 0) / channels))
    if HAS_RESIDUAL:
        out += tl.load(RESIDUAL + row + c, mask=keep, other=0.0).to(tl.float32)
    tl.store(OUT + row + c, out.to(OUT.dtype.element_ty), mask=keep)


def rms_norm_backward(
    x_NC: Tensor, weight_C: Tensor, eps: float, grad_NC: Tensor, residual_NC: Tensor | None
) -> Tensor:
    """Computes the gradient of x, plus the gradient of the residual stream if one is given."""
    out_NC = torch.empty_like(x_NC)
    tokens, channels = x_NC.shape
    block = triton.next_power_of_2(channels)
    _rms_norm_backward_kernel[(tokens,)](
        x_NC, weight_C, grad_NC, grad_NC if residual_NC is None else residual_NC, out_NC, channels, eps,
        BLOCK=block, HAS_RESIDUAL=residual_NC is not None, num_warps=_warps(block),
    )  # fmt: skip
    return out_NC


# ---- SwiGLU ----------------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_kernel(GATE_UP, HIDDEN, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = i < inner
    gate = tl.load(GATE_UP + row * 2 * inner + i, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * inner + inner + i, mask=keep, other=0.0).to(tl.float32)
    tl.store(HIDDEN + row * inner + i, (gate * tl.sigmoid(gate) * up).to(HIDDEN.dtype.element_ty), mask=keep)


def swiglu(gate_up_NO: Tensor) -> Tensor:
    """Computes silu(gate) * up: [N, 2 I] -> [N, I]."""
    tokens, inner = gate_up_NO.shape[0], gate_up_NO.shape[1] // 2
    hidden_NI = gate_up_NO.new_empty(tokens, inner)
    block = 2048
    _swiglu_kernel[(tokens, triton.cdiv(inner, block))](gate_up_NO, hidden_NI, inner, BLOCK=block, num_warps=4)
    return hidden_NI


@triton.jit
def _swiglu_backward_kernel(GATE_UP, GRAD, GRAD_GATE_UP, HIDDEN, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = i < inner
    wide = row * 2 * inner + i
    gate = tl.load(GATE_UP + wide, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + wide + inner, mask=keep, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + row * inner + i, mask=keep, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(GRAD_GATE_UP + wide, grad_gate.to(GRAD_GATE_UP.dtype.element_ty), mask=keep)
    tl.store(GRAD_GATE_UP + wide + inner, (grad * silu).to(GRAD_GATE_UP.dtype.element_ty), mask=keep)
    tl.store(HIDDEN + row * inner + i, (silu * up).to(HIDDEN.dtype.element_ty), mask=keep)


def swiglu_backward(gate_up_NO: Tensor, grad_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the gradients of gate and up [N, 2 I], and recomputes the output of SwiGLU [N, I]."""
    tokens, inner = grad_NI.shape
    grad_NO, hidden_NI = torch.empty_like(gate_up_NO), torch.empty_like(grad_NI)
    block = 2048
    _swiglu_backward_kernel[(tokens, triton.cdiv(inner, block))](
        gate_up_NO, grad_NI, grad_NO, hidden_NI, inner, BLOCK=block, num_warps=4
    )
    return grad_NO, hidden_NI


# ---- rotary positions ------------------------------------------------------------------------------------------------


@triton.jit
def _rotate_kernel(Y, COS, SIN, width, heads, sign, D: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, D // 2)[None, :]
    keep = (head < heads) & (d < D // 2)
    dtype = Y.dtype.element_ty
    # rounded to the type of the model before use, as in transformers
    cos = tl.load(COS + token * D + d).to(dtype).to(tl.float32)
    sin = tl.load(SIN + token * D + d).to(dtype).to(tl.float32) * sign
    at = Y + token * width + head * D + d
    first = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    second = tl.load(at + D // 2, mask=keep, other=0.0).to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(dtype), mask=keep)
    tl.store(at + D // 2, (second * cos + first * sin).to(dtype), mask=keep)


def rotate_(y_NO: Tensor, cos_ND: Tensor, sin_ND: Tensor, heads: int, back: bool = False) -> Tensor:
    """Applies rotary positions in place to the first ``heads`` heads of each row; ``back`` reverses it."""
    width = cos_ND.shape[-1]
    _rotate_kernel[(y_NO.shape[0],)](
        y_NO, cos_ND, sin_ND, y_NO.shape[1], heads, -1.0 if back else 1.0,
        D=width, HEADS=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    return y_NO


# ---- FP8 -------------------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_rows_kernel(X, OUT, SCALE, stride, channels, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    keep = c < channels
    x = tl.load(X + row * stride + c, mask=keep, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / 448.0
    tl.store(OUT + row * channels + c, (x / scale).to(OUT.dtype.element_ty), mask=keep)
    tl.store(SCALE + row, scale)


def quantize_rows(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes rows to e4m3 numbers [N, C], each row with its own scale [N, 1] in fp32."""
    tokens, channels = x_NC.shape
    out_NC = torch.empty(tokens, channels, dtype=FP8, device=x_NC.device)
    scale_N1 = torch.empty(tokens, 1, dtype=torch.float32, device=x_NC.device)
    block = triton.next_power_of_2(channels)
    _quantize_rows_kernel[(tokens,)](
        x_NC, out_NC, scale_N1, x_NC.stride(0), channels, BLOCK=block, num_warps=_warps(block)
    )
    return out_NC, scale_N1
