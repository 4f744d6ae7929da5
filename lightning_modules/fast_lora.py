"""Fused forward and backward of decoder blocks whose base is frozen.

Two autograd functions a block: norm+QKV+rotary+attention+output projection+residual, and norm+MLP+residual. So the
residual stream's gradient is added where a norm's is written, and Q, K and V are one buffer from product to kernel.

Shapes in names: N tokens, C channels of the residual stream, O output channels of a group of projections, R ranks of
its LoRA matrices together.

What the plain path (PEFT over bitsandbytes modules) pays for and this does not:

- a group's projections (Q, K, V; gate, up) are one product, their LoRA A matrices another: bigger, fewer GEMMs;
- NF4 is dequantised once per use into a buffer that is freed at once: no saved dequantised weight;
- LoRA's product is written first and the base's accumulated onto it, where reading the buffer hides behind arithmetic:
  no separate buffer, no fp32 copies;
- what is expensive to make again is kept (GEMM outputs), what is cheap is recomputed (norms, SwiGLU): about 94 KB a
  token and layer of a 7B model.

PEFT still owns the LoRA parameters: they are read from its modules at every call, so saving, loading and merging stay
PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.fp8 import Fp8Weight
from lightning_modules.packed_attention import attend, attend_backward
from lightning_modules.pointwise import rms_norm, rms_norm_backward, rotate_, swiglu, swiglu_backward
from lightning_modules.segment_plan import SegmentPlan


class FrozenWeight:
    """A projection's frozen weight [out, in], dense or NF4; :meth:`read` gives it in the compute dtype.

    Args:
        module: ``nn.Linear``, or bitsandbytes' ``Linear4bit`` (NF4 or FP4).
        undo_nesting: keep the scales of a double-quantised weight in fp32 (0.4 GB more for 7B parameters, a third less
            time to dequantise).
    """

    def __init__(self, module: Any, undo_nesting: bool = True) -> None:
        self.module = module
        state = getattr(module.weight, "quant_state", None)
        self.state = state
        self.shape = torch.Size(state.shape if state is not None else module.weight.shape)
        self._absmax = _unnested_scales(state) if state is not None and undo_nesting else None

    def read(self, out: Tensor) -> None:
        """Writes the weight into ``out`` [out, in], whose rows are contiguous."""
        if self.state is None:
            out.copy_(self.module.weight)
            return
        absmax = self._absmax if self._absmax is not None else _unnested_scales(self.state)
        operator = torch.ops.bitsandbytes.dequantize_4bit
        arguments = (self.module.weight, absmax, self.state.blocksize, self.state.quant_type, self.shape, out.dtype)
        if out.is_cuda:
            operator.out(*arguments, out=out)
        else:
            out.copy_(operator.default(*arguments))  # bitsandbytes has no out variant on a CPU


def _unnested_scales(state: Any) -> Tensor:
    """The fp32 scales of a quantised weight, their own quantisation undone."""
    if not state.nested:
        return state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


@dataclass
class Projection:
    """One linear layer as PEFT left it: a frozen weight and, where it is adapted, A [r, in] and B [out, r]."""

    weight: FrozenWeight
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, module: Any, undo_nesting: bool = True) -> Projection:
        """Reads a linear layer or a PEFT LoRA layer around one.

        Raises:
            NotImplementedError: a feature that the fused functions do not compute; the message names it.
        """
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if getattr(base, "bias", None) is not None:
            raise NotImplementedError("a projection has a bias")
        if base.weight.dtype == torch.int8:
            raise NotImplementedError("the base is quantised to int8")
        weight = FrozenWeight(base, undo_nesting)
        if base is module or not module.active_adapters:
            return cls(weight)
        if len(module.active_adapters) > 1:
            raise NotImplementedError("more than one adapter is active")
        name = module.active_adapters[0]
        if name not in module.lora_A:
            return cls(weight)
        if module.use_dora.get(name) or module.lora_variant.get(name):
            raise NotImplementedError("DoRA, or another LoRA variant")
        if getattr(module.lora_dropout[name], "p", 0.0) > 0:
            raise NotImplementedError("LoRA dropout > 0")
        if module.lora_bias.get(name):
            raise NotImplementedError("a LoRA bias")
        return cls(weight, module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))


@dataclass
class Group:
    """Projections of one input, computed as one product.

    Attributes:
        members: the projections, in the order of their outputs.
        sizes: outputs of each.
        fp8: the base's weights in FP8, where :meth:`to_fp8` was called.
    """

    members: Sequence[Projection]
    sizes: list[int] = field(init=False)
    fp8: Fp8Weight | None = None

    def __post_init__(self) -> None:
        self.sizes = [member.weight.shape[0] for member in self.members]

    def to_fp8(self, dtype: torch.dtype) -> None:
        """Has the base's products computed in FP8 from now on; ``dtype`` is what the weights are quantised from."""
        module = self.members[0].weight.module
        self.fp8 = Fp8Weight.of(self.weight_OC(torch.empty(0, dtype=dtype, device=module.weight.device)))

    def without_adapter(self) -> Group:
        """The same frozen weights, in whatever form they are, without LoRA."""
        return Group([Projection(member.weight) for member in self.members], fp8=self.fp8)

    def weight_OC(self, like: Tensor) -> Tensor:
        """The base's weights, dequantised into a new buffer (or the weight itself where there is nothing to do)."""
        first = self.members[0].weight
        if len(self.members) == 1 and first.state is None and first.module.weight.dtype == like.dtype:
            return first.module.weight
        buffer = like.new_empty(sum(self.sizes), first.shape[1])
        for member, out in zip(self.members, buffer.split(self.sizes), strict=True):
            member.weight.read(out)
        return buffer

    def parameters(self) -> list[Tensor | None]:
        """A and B of every member, None where it is not adapted: what an autograd function must see as inputs."""
        return [parameter for member in self.members for parameter in (member.a, member.b)]

    def a_RC(self, parameters: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
        """The members' A matrices in one."""
        found = [a.to(dtype) for a in parameters[::2] if a is not None]
        return torch.cat(found) if len(found) > 1 else (found[0] if found else None)

    def ranked(self, parameters: Sequence[Tensor | None]) -> list[tuple[int, slice, slice, Tensor, float]]:
        """Of each adapted member: (index, its outputs, its ranks, B, scale)."""
        found, output, rank = [], 0, 0
        for index, (member, size) in enumerate(zip(self.members, self.sizes, strict=True)):
            b = parameters[2 * index + 1]
            if b is not None:
                ranks = slice(rank, rank + b.shape[1])
                found.append((index, slice(output, output + size), ranks, b, member.scale))
                rank = ranks.stop
            output += size
        return found

    def forward(
        self, x_NC: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the outputs [N, O] (plus ``residual``) and x A^T [N, R], which the backward pass wants."""
        a_RC = self.a_RC(parameters, x_NC.dtype)
        xa_NR = None if a_RC is None else x_NC @ a_RC.T
        if self.fp8 is not None:
            y_NO = self.fp8.forward(x_NC)
            y_NO = y_NO if residual is None else y_NO.add_(residual)
            return self._add_adapters(y_NO, xa_NR, parameters), xa_NR
        weight_OC = self.weight_OC(x_NC)
        if xa_NR is None:
            return (x_NC @ weight_OC.T if residual is None else torch.addmm(residual, x_NC, weight_OC.T)), None
        y_NO = x_NC.new_empty(len(x_NC), sum(self.sizes)) if residual is None else residual.clone()
        self._add_adapters(y_NO, xa_NR, parameters, fresh=residual is None)
        return y_NO.addmm_(x_NC, weight_OC.T), xa_NR

    def _add_adapters(
        self, y_NO: Tensor, xa_NR: Tensor | None, parameters: Sequence[Tensor | None], fresh: bool = False
    ) -> Tensor:
        """Adds x A^T B^T to the outputs in place, or writes it where they are ``fresh``."""
        if xa_NR is None:
            return y_NO
        ranked = self.ranked(parameters)
        if fresh and len(ranked) < len(self.members):
            y_NO.zero_()
        for _, outputs, ranks, b, scale in ranked:
            y_NO[:, outputs].addmm_(xa_NR[:, ranks], b.to(y_NO.dtype).T, beta=0 if fresh else 1, alpha=scale)
        return y_NO

    def input_gradient(
        self, grad_NO: Tensor, parameters: Sequence[Tensor | None], need_input: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the input [N, C] (None unless needed) and of x A^T [N, R] (None without adapters)."""
        a_RC, ga_NR = self.a_RC(parameters, grad_NO.dtype), None
        if a_RC is not None:
            ga_NR = grad_NO.new_empty(len(grad_NO), len(a_RC))
            for _, outputs, ranks, b, scale in self.ranked(parameters):
                torch.mul(grad_NO[:, outputs] @ b.to(grad_NO.dtype), scale, out=ga_NR[:, ranks])
        if not need_input:
            return None, ga_NR
        if self.fp8 is not None:
            grad_NC = self.fp8.backward(grad_NO)
            return (grad_NC if a_RC is None or ga_NR is None else grad_NC.addmm_(ga_NR, a_RC)), ga_NR
        weight_OC = self.weight_OC(grad_NO)
        if a_RC is None or ga_NR is None:
            return grad_NO @ weight_OC, None
        return (ga_NR @ a_RC).addmm_(grad_NO, weight_OC), ga_NR

    def parameter_gradients(
        self,
        grad_NO: Tensor,
        ga_NR: Tensor | None,
        x_NC: Tensor,
        xa_NR: Tensor | None,
        parameters: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Gradients of every A and B."""
        grads: list[Tensor | None] = [None] * len(parameters)
        if ga_NR is None:
            return grads
        if xa_NR is None:
            xa_NR = x_NC @ self.a_RC(parameters, x_NC.dtype).T  # type: ignore[union-attr]
        grad_a = ga_NR.T @ x_NC
        for index, outputs, ranks, b, scale in self.ranked(parameters):
            grads[2 * index] = grad_a[ranks].to(b.dtype)
            grads[2 * index + 1] = (grad_NO[:, outputs].T @ xa_NR[:, ranks]).mul_(scale).to(b.dtype)
        return grads


# ---- the two functions of a block ------------------------------------------------------------------------------------


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
        plan: SegmentPlan,
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
