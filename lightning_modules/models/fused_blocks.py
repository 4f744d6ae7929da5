"""Fused forward and backward passes of decoder blocks whose base is frozen.

Each block has two autograd functions: norm+QKV+rotary+attention+output projection+residual, and norm+MLP+residual. So
the gradient of the residual stream is added in the kernel that writes the gradient of a norm, and Q, K and V are one
buffer from the product to the attention kernel.

Results that are expensive to recompute are kept (outputs of GEMMs), inexpensive ones are recomputed (norms, SwiGLU):
about 94 KB per token and layer of a 7B model.

Shapes in names: N tokens, n selected tokens, C channels of the residual stream, H query heads, K key-value heads, D
head width, O output channels of a group, R sum of the ranks of its LoRA matrices.
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
from lightning_modules.models.fused_lora import ProjectionGroup


@dataclass(frozen=True)
class NormWeights:
    """Frozen weight and epsilon of an RMSNorm."""

    weight_C: Tensor
    eps: float


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of the attention half of a block.

    Attributes:
        norm: RMSNorm of its input.
        qkv: projections of queries, keys and values.
        output: projection back to the residual stream.
        heads: numbers of query heads and of key-value heads.
        scale: factor of the scores.
    """

    norm: NormWeights
    qkv: ProjectionGroup
    output: ProjectionGroup
    heads: tuple[int, int]
    scale: float

    def split(self, y_NO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns views of queries [N, H, D], keys and values [N, K, D] in one buffer."""
        heads, shared = self.heads
        query, key, value = y_NO.unflatten(-1, (heads + 2 * shared, -1)).split([heads, shared, shared], 1)
        return query, key, value


@dataclass(frozen=True)
class MLPWeights:
    """Weights of the MLP half of a block.

    Attributes:
        norm: RMSNorm of its input.
        gate_up: projections to the inner channels.
        down: projection back to the residual stream.
    """

    norm: NormWeights
    gate_up: ProjectionGroup
    down: ProjectionGroup


class AttentionBlock(torch.autograd.Function):
    """x + O(attention(Q, K, V of norm(x))), with LoRA: x [N, C] -> [N, C], or [n, C] at the positions ``rows``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        block: AttentionWeights,
        cos_ND: Tensor,
        sin_ND: Tensor,
        plan: AttentionPlan,
        rows: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        """Computes the output and saves the tensors that the backward pass needs."""
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
        """Computes the gradients, in the order of the inputs."""
        x_NC, xa_NR, y_NO, out_NHD, lse_HN, oa_NR, cos_ND, sin_ND, rows = ctx.saved_tensors
        block, (first, second) = ctx.block, _halves(ctx.block.qkv, ctx.parameters)
        attended = out_NHD.flatten(1) if rows is None else out_NHD.flatten(1).index_select(0, rows)
        grad_attended, ga_NR = block.output.input_gradient(grad, second)
        output_grads = block.output.parameter_gradients(grad, ga_NR, attended, oa_NR, second)
        if rows is not None:  # the output of the other rows is not used
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

    ``keep`` saves gate and up (57 KB per token of a 7B model) for the backward pass; otherwise they are recomputed, in
    chunks of ``chunk`` tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, block: MLPWeights, keep: bool, chunk: int, *parameters: Tensor | None
    ) -> Tensor:
        """Computes the output and saves the tensors that the backward pass needs."""
        ctx.block, ctx.keep, ctx.chunk, ctx.parameters = block, keep, chunk, parameters
        first, second = _halves(block.gate_up, parameters)
        outputs = []
        saved: tuple[Tensor | None, ...] = ()
        for x in (x_NC,) if keep else x_NC.split(chunk):
            gate_up, xa = block.gate_up.forward(rms_norm(x, block.norm.weight_C, block.norm.eps), first)
            y, ha = block.down.forward(swiglu(gate_up), second, x)
            outputs.append(y)
            saved = (gate_up, xa, ha) if keep else ()
        ctx.save_for_backward(x_NC, *saved)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients, in the order of the inputs."""
        x_NC, *saved = ctx.saved_tensors
        if ctx.keep:
            grad, parameters = MLPBlock._chunk_gradients(ctx, x_NC, grad_NC, *saved)
            return grad, None, None, None, *parameters
        block, (first, _) = ctx.block, _halves(ctx.block.gate_up, ctx.parameters)
        grads: list[Tensor | None] = []
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for x, g in zip(x_NC.split(ctx.chunk), grad_NC.split(ctx.chunk), strict=True):
            gate_up, xa = block.gate_up.forward(rms_norm(x, block.norm.weight_C, block.norm.eps), first)
            grad, parameters = MLPBlock._chunk_gradients(ctx, x, g, gate_up, xa, None)
            grads.append(grad)
            sums = [
                new if old is None else (old if new is None else old + new)
                for old, new in zip(sums, parameters, strict=True)
            ]
        joined = torch.cat([grad for grad in grads if grad is not None]) if grads[0] is not None else None
        return joined, None, None, None, *sums

    @staticmethod
    def _chunk_gradients(
        ctx: Any, x: Tensor, grad: Tensor, gate_up: Tensor, xa: Tensor | None, ha: Tensor | None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Computes the gradients from a run of tokens: (of x, or None if not needed, of every A and B)."""
        block, (first, second) = ctx.block, _halves(ctx.block.gate_up, ctx.parameters)
        grad_hidden, gb = block.down.input_gradient(grad, second)
        grad_gate_up, hidden = swiglu_backward(gate_up, grad_hidden)
        down_grads = block.down.parameter_gradients(grad, gb, hidden, ha, second)
        del hidden, grad_hidden
        grad_normed, ga = block.gate_up.input_gradient(grad_gate_up, first, ctx.needs_input_grad[0])
        normed = rms_norm(x, block.norm.weight_C, block.norm.eps) if ga is not None else x
        gate_up_grads = block.gate_up.parameter_gradients(grad_gate_up, ga, normed, xa, first)
        if grad_normed is not None:
            grad_normed = rms_norm_backward(x, block.norm.weight_C, block.norm.eps, grad_normed, grad)
        return grad_normed, [*gate_up_grads, *down_grads]


def _halves(
    first: ProjectionGroup, parameters: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Splits A and B of two groups: those of the first group, those of the second."""
    cut = 2 * len(first.members)
    return parameters[:cut], parameters[cut:]
