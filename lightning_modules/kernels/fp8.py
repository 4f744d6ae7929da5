"""Products with the frozen base in FP8 (e4m3), with one scale per row of each factor.

An H100 multiplies FP8 at 1,350-1,380 TFLOP/s and bf16 at 640-780 (measured at the shapes of a 7B model). The base is
quantized once, when training begins, in two layouts, as stored and transposed (2 bytes per weight), since the
contracted dimension of both factors must be contiguous: x W^T contracts over inputs, dy W over outputs. Activations and
gradients are quantized for each product, each row by its own largest entry. The products of LoRA stay in 16 bits.

Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433; row-wise scales as in torchao.

Shapes in names: N tokens, C input channels, O output channels; M, N and K rows, columns and inner size of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.kernels.pointwise import quantize_rows

MULTIPLE = 16  #: both dimensions of a weight must be a multiple of it for the FP8 product of the GPU
CAPABILITY = (8, 9)  #: compute capability of the first NVIDIA GPUs with FP8 products


@dataclass(frozen=True)
class Fp8Weight:
    """A frozen weight [O, C] in FP8, in both layouts.

    Attributes:
        rows_OC: e4m3 numbers, quantized per output channel.
        row_scales_1O: their scales, fp32.
        columns_CO: e4m3 numbers of the transposed weight, quantized per input channel.
        column_scales_1C: their scales, fp32.
    """

    rows_OC: Tensor
    row_scales_1O: Tensor
    columns_CO: Tensor
    column_scales_1C: Tensor

    @classmethod
    def of(cls, weight_OC: Tensor) -> Fp8Weight:
        """Quantizes a weight.

        Raises:
            NotImplementedError: a dimension is not a multiple of 16.
        """
        if any(size % MULTIPLE for size in weight_OC.shape):
            raise NotImplementedError(
                f"FP8 products need sizes that are multiples of {MULTIPLE}, not {tuple(weight_OC.shape)}"
            )
        rows_OC, row_scales = quantize_rows(weight_OC)
        columns_CO, column_scales = quantize_rows(weight_OC.T.contiguous())
        return cls(rows_OC, row_scales.T.contiguous(), columns_CO, column_scales.T.contiguous())

    def forward(self, x_NC: Tensor) -> Tensor:
        """Computes x W^T: [N, O] in the dtype of x."""
        return _product(x_NC, self.rows_OC, self.row_scales_1O)

    def backward(self, grad_NO: Tensor) -> Tensor:
        """Computes dy W: [N, C] in the dtype of dy."""
        return _product(grad_NO, self.columns_CO, self.column_scales_1C)


def _product(a_MK: Tensor, b_NK: Tensor, scales_1N: Tensor) -> Tensor:
    numbers_MK, scales_M1 = quantize_rows(a_MK)
    if not a_MK.is_cuda:  # the same arithmetic, without the hardware
        return ((numbers_MK.float() @ b_NK.float().T) * scales_M1 * scales_1N).to(a_MK.dtype)
    # A private operator, called here only: the public torch.nn.functional.scaled_mm is newer than torch 2.9, the oldest
    # release that this project supports (torch_xla needs it).
    return torch._scaled_mm(
        numbers_MK, b_NK.T, scale_a=scales_M1, scale_b=scales_1N, out_dtype=a_MK.dtype, use_fast_accum=True
    )
