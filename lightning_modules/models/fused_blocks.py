"""Fused forward and backward of decoder blocks whose base is frozen.

Two autograd functions a block: norm+QKV+rotary+attention+output projection+residual, and norm+MLP+residual. So the
residual stream's gradient is added where a norm's is written, and Q, K and V are one buffer from product to kernel.

What is expensive to make again is kept (GEMM outputs), what is cheap is recomputed (norms, SwiGLU): about 94 KB a token
and layer of a 7B model.

Shapes in names: N tokens, C channels of the residual stream, H query heads, K key-value heads, D head width, R ranks of
a group's LoRA matrices together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.kernels.attention_plan import AttentionPlan
from lightning_modules.kernels.pointwise import rms_norm, rms_norm_backward, rotate_, swiglu, swiglu_backward
from lightning_modules.kernels.prefix_attention import attend, attend_backward
from lightning_modules.models.fused_lora import Group


@dataclass(frozen=True)
class Norm:
    """RMSNorm's frozen weight and epsilon."""

    weight_C: Tensor
    eps: float


@dataclass(frozen=True)
class Attention:
    """The attention half of a block.

    Attributes:
        norm: before it.
        qkv: projections of queries, keys and values.
        output: projection back to the residual stream.
        heads: query heads and key-value heads.
        scale: of the scores.
    """

    norm: Norm
    qkv: Group
    output: Group
    heads: tuple[int, int]
    scale: float

    def split(self, y_NO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of queries [N, H, D], keys and values [N, K, D] in one buffer."""
        heads, shared = self.heads
        query, key, value = y_NO.unflatten(-1, (heads + 2 * shared, -1)).split([heads, shared, shared], 1)
        return query, key, value


@dataclass(frozen=True)
class MLP:
    """The MLP half of a block: norm, gate and up, down."""

    norm: Norm
    wide: Group
    down: Group


class AttentionBlock(torch.autograd.Function):
    """x + O(attention(Q, K, V of norm(x))), with LoRA: x [N, C] -> [N, C], or [n, C] at the rows asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        block: Attention,
        cos_ND: Tensor,
        sin_ND: Tensor,
        plan: AttentionPlan,
        rows: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        """Computes the output and saves what the backward pass wants."""
        first, second = _halves(block.qkv, parameters)
        y_NO, xa_NR = block.qkv.forward(rms_norm(x_NC, block.norm.weight_C, block.norm.eps), first)
        rotate_(y_NO, cos_ND, sin_ND, sum(block.heads))
        out_NHD, lse_HN = attend(*block.split(y_NO), plan, block.scale)
        attended, residual = out_NHD.flatten(1), x_NC
        if rows is not None:
            attended, residual = attended.index_select(0, rows), x_NC.index_select(0, rows)
        result, oa_NR = block.output.forward(attended, second, residual)
        ctx.save_for_backward(x_NC, xa_NR, y_NO, out_NHD, lse_HN, oa_NR, cos_ND, sin_ND, rows)
        ctx.block, ctx.plan, ctx.parameters = block, plan, parameters
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the inputs."""
        x_NC, xa_NR, y_NO, out_NHD, lse_HN, oa_NR, cos_ND, sin_ND, rows = ctx.saved_tensors
        block, (first, second) = ctx.block, _halves(ctx.block.qkv, ctx.parameters)
        attended = out_NHD.flatten(1) if rows is None else out_NHD.flatten(1).index_select(0, rows)
        grad_attended, ga_NR = block.output.input_gradient(grad, second)
        output_grads = block.output.parameter_gradients(grad, ga_NR, attended, oa_NR, second)
        if rows is not None:  # the other rows' output was not asked for
            grad_attended = out_NHD.new_zeros(out_NHD.flatten(1).shape).index_copy_(0, rows, grad_attended)
            grad = torch.zeros_like(x_NC).index_copy_(0, rows, grad)
        grad_NO = torch.empty_like(y_NO)
        grad_attended, queries = grad_attended.view_as(out_NHD), block.split(y_NO)
        attend_backward(grad_attended, queries, out_NHD, lse_HN, ctx.plan, block.scale, block.split(grad_NO))
        rotate_(grad_NO, cos_ND, sin_ND, sum(block.heads), True)
        grad_NC, ga_NR = block.qkv.input_gradient(grad_NO, first, ctx.needs_input_grad[0])
        normed = rms_norm(x_NC, block.norm.weight_C, block.norm.eps) if ga_NR is not None else x_NC
        qkv_grads = block.qkv.parameter_gradients(grad_NO, ga_NR, normed, xa_NR, first)
        if grad_NC is not None:
            grad_NC = rms_norm_backward(x_NC, block.norm.weight_C, block.norm.eps, grad_NC, grad)
        return grad_NC, None, None, None, None, None, *qkv_grads, *output_grads


class MLPBlock(torch.autograd.Function):
    """x + down(SwiGLU(gate and up of norm(x))), with LoRA: x [N, C] -> [N, C].

    ``keep`` saves gate and up (57 KB a token of a 7B model) for the backward pass; otherwise they are made again, in
    pieces of ``chunk`` tokens.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, block: MLP, keep: bool, chunk: int, *parameters: Tensor | None) -> Tensor:
        """Computes the output and saves what the backward pass wants."""
        ctx.block, ctx.keep, ctx.chunk, ctx.parameters = block, keep, chunk, parameters
        first, second = _halves(block.wide, parameters)
        pieces = []
        saved: tuple[Tensor | None, ...] = ()
        for x in (x_NC,) if keep else x_NC.split(chunk):
            gate_up, xa = block.wide.forward(rms_norm(x, block.norm.weight_C, block.norm.eps), first)
            y, ha = block.down.forward(swiglu(gate_up), second, x)
            pieces.append(y)
            saved = (gate_up, xa, ha) if keep else ()
        ctx.save_for_backward(x_NC, *saved)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the inputs."""
        x_NC, *saved = ctx.saved_tensors
        if ctx.keep:
            grad, parameters = MLPBlock._piece(ctx, x_NC, grad_NC, *saved)
            return grad, None, None, None, *parameters
        block, (first, _) = ctx.block, _halves(ctx.block.wide, ctx.parameters)
        grads: list[Tensor | None] = []
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for x, g in zip(x_NC.split(ctx.chunk), grad_NC.split(ctx.chunk), strict=True):
            gate_up, xa = block.wide.forward(rms_norm(x, block.norm.weight_C, block.norm.eps), first)
            grad, parameters = MLPBlock._piece(ctx, x, g, gate_up, xa, None)
            grads.append(grad)
            sums = [
                new if old is None else (old if new is None else old + new)
                for old, new in zip(sums, parameters, strict=True)
            ]
        joined = torch.cat([grad for grad in grads if grad is not None]) if grads[0] is not None else None
        return joined, None, None, None, *sums

    @staticmethod
    def _piece(
        ctx: Any, x: Tensor, grad: Tensor, gate_up: Tensor, xa: Tensor | None, ha: Tensor | None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients over a run of tokens: (of x or None, of every A and B)."""
        block, (first, second) = ctx.block, _halves(ctx.block.wide, ctx.parameters)
        grad_hidden, gb = block.down.input_gradient(grad, second)
        grad_wide, hidden = swiglu_backward(gate_up, grad_hidden)
        down_grads = block.down.parameter_gradients(grad, gb, hidden, ha, second)
        del hidden, grad_hidden
        grad_normed, ga = block.wide.input_gradient(grad_wide, first, ctx.needs_input_grad[0])
        normed = rms_norm(x, block.norm.weight_C, block.norm.eps) if ga is not None else x
        wide_grads = block.wide.parameter_gradients(grad_wide, ga, normed, xa, first)
        if grad_normed is not None:
            grad_normed = rms_norm_backward(x, block.norm.weight_C, block.norm.eps, grad_normed, grad)
        return grad_normed, [*wide_grads, *down_grads]


def _halves(
    wide: Group, parameters: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    cut = 2 * len(wide.members)
    return parameters[:cut], parameters[cut:]
