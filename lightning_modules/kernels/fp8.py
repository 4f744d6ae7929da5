"""Products with the frozen base in FP8 (e4m3), one scale a row of either factor.

An H100 multiplies FP8 at 1,350-1,380 TFLOP/s where bf16 reaches 640-780 (measured at the shapes of a 7B model). The
base is quantised once, when training begins, as it stands and transposed (2 bytes a weight), since both factors'
contracted dimension must be contiguous: x W^T contracts over inputs, dy W over outputs. Activations and gradients are
quantised where they are multiplied, each row by its own largest entry. LoRA's products stay in 16 bits.

Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433; row-wise scales as in torchao's recipe.

Shapes in names: N tokens, C input channels, O output channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.kernels.pointwise import quantize_rows

MULTIPLE = 16  #: of both dimensions of a weight, which the GPU's FP8 product wants
CAPABILITY = (8, 9)  #: of the first NVIDIA GPUs with FP8 products


@dataclass(frozen=True)
class Fp8Weight:
    """A frozen weight [O, C] in FP8, twice."""

    rows_OC: Tensor
    row_scales_1O: Tensor
    columns_CO: Tensor
    column_scales_1C: Tensor

    @classmethod
    def of(cls, weight_OC: Tensor) -> Fp8Weight:
        """Quantises a weight.

        Raises:
            NotImplementedError: a dimension is no multiple of 16.
        """
        if any(size % MULTIPLE for size in weight_OC.shape):
            raise NotImplementedError(
                f"FP8 products want sizes that are multiples of {MULTIPLE}, not {tuple(weight_OC.shape)}"
            )
        rows_OC, row_scales = quantize_rows(weight_OC)
        columns_CO, column_scales = quantize_rows(weight_OC.T.contiguous())
        return cls(rows_OC, row_scales.T.contiguous(), columns_CO, column_scales.T.contiguous())

    def forward(self, x_NC: Tensor) -> Tensor:
        """X W^T: [N, O] in the dtype of x."""
        return _product(x_NC, self.rows_OC, self.row_scales_1O)

    def backward(self, grad_NO: Tensor) -> Tensor:
        """Dy W: [N, C] in the dtype of dy."""
        return _product(grad_NO, self.columns_CO, self.column_scales_1C)


def _product(a_MK: Tensor, b_NK: Tensor, scales_1N: Tensor) -> Tensor:
    numbers_MK, scales_M1 = quantize_rows(a_MK)
    if not a_MK.is_cuda:  # the same numbers without the hardware
        return ((numbers_MK.float() @ b_NK.float().T) * scales_M1 * scales_1N).to(a_MK.dtype)
    return torch._scaled_mm(
        numbers_MK, b_NK.T, scale_a=scales_M1, scale_b=scales_1N, out_dtype=a_MK.dtype, use_fast_accum=True
    )
