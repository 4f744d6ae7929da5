"""The cheap parts of a decoder block: norms, SwiGLU, rotary positions, quantised rows.

Plain torch, which is also what the GPU kernels of :mod:`lightning_modules.kernels.pointwise_triton` are held against.
A CPU runs it as it is: compiling there costs minutes.

Shapes in names: N tokens, C channels, O and I outer and inner channels of the MLP, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _on_gpu(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the Triton kernel of this name on CUDA tensors, the reference elsewhere."""

    def run(first: Tensor, *rest: Any) -> Any:
        if not first.is_cuda:
            return reference(first, *rest)
        from lightning_modules.kernels import pointwise_triton

        return getattr(pointwise_triton, name)(first, *rest)

    run.__doc__ = reference.__doc__
    return run


def rms_norm_reference(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """X / rms(x) * weight, in the dtype of x."""
    wide = _wide(x_NC)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_NC.dtype) * weight_C


def rms_norm_backward_reference(
    x_NC: Tensor, weight_C: Tensor, eps: float, grad_NC: Tensor, residual_NC: Tensor | None
) -> Tensor:
    """Gradient of x, plus the residual stream's own gradient where there is one."""
    wide = _wide(x_NC)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * inverse
    grad = _wide(grad_NC) * _wide(weight_C)
    grad = inverse * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return (grad if residual_NC is None else grad + residual_NC).to(x_NC.dtype)


def swiglu_reference(gate_up_NO: Tensor) -> Tensor:
    """silu(gate) * up: [N, 2 I] -> [N, I]."""
    gate, up = gate_up_NO.chunk(2, -1)
    return (nn.functional.silu(_wide(gate)) * up).to(gate.dtype)


def swiglu_backward_reference(gate_up_NO: Tensor, grad_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up [N, 2 I], and SwiGLU's output [N, I] made again."""
    gate, up = (_wide(x) for x in gate_up_NO.chunk(2, -1))
    sigmoid = torch.sigmoid(gate)
    silu, wide = gate * sigmoid, _wide(grad_NI)
    grad_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, wide * silu], -1).to(grad_NI.dtype), (silu * up).to(grad_NI.dtype)


def rotate_reference_(y_NO: Tensor, cos_ND: Tensor, sin_ND: Tensor, heads: int, back: bool = False) -> Tensor:
    """Applies rotary positions in place to the first ``heads`` heads of each row; ``back`` undoes it."""
    turned = y_NO[:, : heads * cos_ND.shape[-1]].unflatten(-1, (heads, -1))
    cos, sin = cos_ND.to(y_NO.dtype)[:, None], sin_ND.to(y_NO.dtype)[:, None]
    first, second = turned.chunk(2, -1)
    crossed = torch.cat([-second, first], -1)
    turned.copy_(turned * cos + crossed * (-sin if back else sin))
    return y_NO


def quantize_rows_reference(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers [N, C] and each row's scale [N, 1] in fp32; the largest of a row becomes 448."""
    wide = x_NC.float()
    scale_N1 = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448.0
    return (wide / scale_N1).to(torch.float8_e4m3fn), scale_N1


def _wide(x: Tensor) -> Tensor:
    """At least fp32: norms and SwiGLU are computed there, as the plain modules do."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


rms_norm = _on_gpu("rms_norm", rms_norm_reference)
rms_norm_backward = _on_gpu("rms_norm_backward", rms_norm_backward_reference)
swiglu = _on_gpu("swiglu", swiglu_reference)
swiglu_backward = _on_gpu("swiglu_backward", swiglu_backward_reference)
rotate_ = _on_gpu("rotate_", rotate_reference_)
quantize_rows = _on_gpu("quantize_rows", quantize_rows_reference)
