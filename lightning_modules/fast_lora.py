"""Fused forward and backward of decoder blocks whose base is frozen.

One autograd function each for norm+QKV+rotary, output projection+residual, and norm+MLP+residual.

Shapes in names: N tokens, C channels of the residual stream, O output channels of a group of projections, R ranks of
its LoRA matrices together.

What the plain path (PEFT over bitsandbytes modules) pays for and this does not:

- a group's projections (Q, K, V; gate, up) are one product, their LoRA A matrices another: bigger, fewer GEMMs;
- NF4 is dequantised once per use into a buffer that is freed at once: no saved dequantised weight;
- LoRA's B product is accumulated into the base's output (``addmm``): no separate buffer, no fp32 copies;
- what is expensive to make again is kept (GEMM outputs), what is cheap is recomputed (norms, SwiGLU): about 94 KB a
  token and layer of a 7B model.

PEFT still owns the LoRA parameters: they are read from its modules at every call, so saving, loading and merging stay
PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Pointwise = Callable[..., Any]


@cache
def _compiled(function: Pointwise) -> Pointwise:
    return torch.compile(function, dynamic=False)


def _pointwise(function: Pointwise) -> Pointwise:
    """Fuses an elementwise function on CUDA; a CPU runs it as it is (compiling there costs minutes)."""

    def run(first: Tensor, *rest: Any) -> Any:
        return (_compiled(function) if first.is_cuda else function)(first, *rest)

    return run


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
    """

    members: Sequence[Projection]
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [member.weight.shape[0] for member in self.members]

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
        weight_OC = self.weight_OC(x_NC)
        y_NO = x_NC @ weight_OC.T if residual is None else torch.addmm(residual, x_NC, weight_OC.T)
        a_RC = self.a_RC(parameters, x_NC.dtype)
        if a_RC is None:
            return y_NO, None
        xa_NR = x_NC @ a_RC.T
        for _, outputs, ranks, b, scale in self.ranked(parameters):
            y_NO[:, outputs].addmm_(xa_NR[:, ranks], b.to(x_NC.dtype).T, alpha=scale)
        return y_NO, xa_NR

    def backward(
        self, grad_NO: Tensor, x_NC: Tensor, xa_NR: Tensor | None, parameters: Sequence[Tensor | None], need_input: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the input [N, C] (None unless needed) and of every A and B."""
        grads: list[Tensor | None] = [None] * len(parameters)
        grad_a = None
        if xa_NR is not None:
            ga_NR = torch.empty_like(xa_NR)
            for index, outputs, ranks, b, scale in self.ranked(parameters):
                part = grad_NO[:, outputs]
                torch.mul(part @ b.to(part.dtype), scale, out=ga_NR[:, ranks])
                grads[2 * index + 1] = (part.T @ xa_NR[:, ranks]).mul_(scale).to(b.dtype)
            grad_a = ga_NR.T @ x_NC
            for index, _, ranks, b, _ in self.ranked(parameters):
                grads[2 * index] = grad_a[ranks].to(b.dtype)
        if not need_input:
            return None, grads
        grad_NC = grad_NO @ self.weight_OC(grad_NO)
        a_RC = self.a_RC(parameters, grad_NO.dtype)
        if a_RC is not None:
            grad_NC.addmm_(ga_NR, a_RC)
        return grad_NC, grads


# ---- pointwise parts -------------------------------------------------------------------------------------------------


def _rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    wide = _wide(x_NC)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_NC.dtype) * weight_C


def _rms_norm_backward(
    x_NC: Tensor, weight_C: Tensor, eps: float, grad_NC: Tensor, residual_NC: Tensor | None
) -> Tensor:
    wide = _wide(x_NC)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * inverse
    grad = _wide(grad_NC * weight_C)
    grad = inverse * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return (grad if residual_NC is None else grad + residual_NC).to(x_NC.dtype)


def _swiglu(gate_up_NO: Tensor) -> Tensor:
    gate, up = gate_up_NO.chunk(2, -1)
    return (nn.functional.silu(_wide(gate)) * up).to(gate.dtype)


def _swiglu_backward(gate_up_NO: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up [N, O], and SwiGLU's output made again."""
    gate, up = (_wide(x) for x in gate_up_NO.chunk(2, -1))
    sigmoid = torch.sigmoid(gate)
    silu, wide = gate * sigmoid, _wide(grad)
    grad_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, wide * silu], -1).to(grad.dtype), (silu * up).to(grad.dtype)


def _rotate(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    first, second = x_NHD.chunk(2, -1)
    return x_NHD * cos_ND[:, None] + torch.cat([-second, first], -1) * sin_ND[:, None]


def _rotate_back(grad_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    first, second = (grad_NHD * sin_ND[:, None]).chunk(2, -1)
    return grad_NHD * cos_ND[:, None] + torch.cat([second, -first], -1)


def _split_heads(
    y_NO: Tensor, cos_ND: Tensor, sin_ND: Tensor, heads: int, shared: int
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = y_NO.unflatten(-1, (-1, cos_ND.shape[-1])).split([heads, shared, shared], 1)
    cos, sin = cos_ND.to(y_NO.dtype), sin_ND.to(y_NO.dtype)
    return _rotate(query, cos, sin), _rotate(key, cos, sin), value.clone()


def _join_heads(query: Tensor, key: Tensor, value: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    cos, sin = cos_ND.to(query.dtype), sin_ND.to(query.dtype)
    return torch.cat([_rotate_back(query, cos, sin), _rotate_back(key, cos, sin), value], 1).flatten(1)


def _wide(x: Tensor) -> Tensor:
    """At least fp32: norms and SwiGLU are computed there, as the plain modules do."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


rms_norm, rms_norm_backward = _pointwise(_rms_norm), _pointwise(_rms_norm_backward)
swiglu, swiglu_backward = _pointwise(_swiglu), _pointwise(_swiglu_backward)
split_heads, join_heads = _pointwise(_split_heads), _pointwise(_join_heads)


# ---- the three functions of a block ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """RMSNorm's frozen weight and epsilon."""

    weight_C: Tensor
    eps: float


class NormQKV(torch.autograd.Function):
    """RMSNorm, Q, K and V with LoRA, rotary positions: x [N, C] -> query [N, H, D], key and value [N, K, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        norm: Norm,
        group: Group,
        cos: Tensor,
        sin: Tensor,
        heads: tuple[int, int],
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Computes the output and saves what the backward pass wants."""
        y_NO, xa_NR = group.forward(rms_norm(x_NC, norm.weight_C, norm.eps), parameters)
        ctx.save_for_backward(x_NC, xa_NR, cos, sin)
        ctx.norm, ctx.group, ctx.parameters = norm, group, parameters
        return split_heads(y_NO, cos, sin, *heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the inputs."""
        x_NC, xa_NR, cos, sin = ctx.saved_tensors
        normed = rms_norm(x_NC, ctx.norm.weight_C, ctx.norm.eps)
        grad_NO = join_heads(*grads, cos, sin)
        grad_NC, parameters = ctx.group.backward(grad_NO, normed, xa_NR, ctx.parameters, ctx.needs_input_grad[0])
        if grad_NC is not None:
            grad_NC = rms_norm_backward(x_NC, ctx.norm.weight_C, ctx.norm.eps, grad_NC, None)
        return grad_NC, None, None, None, None, None, *parameters


class OutputResidual(torch.autograd.Function):
    """Output projection with LoRA, plus the residual stream: (attended [N, H * D], residual [N, C]) -> [N, C]."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, residual_NC: Tensor, group: Group, *parameters: Tensor | None) -> Tensor:
        """Computes the output and saves what the backward pass wants."""
        y_NC, xa_NR = group.forward(attended, parameters, residual_NC)
        ctx.save_for_backward(attended, xa_NR)
        ctx.group, ctx.parameters = group, parameters
        return y_NC

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the inputs."""
        attended, xa_NR = ctx.saved_tensors
        grad, parameters = ctx.group.backward(grad_NC, attended, xa_NR, ctx.parameters, ctx.needs_input_grad[0])
        return grad, grad_NC if ctx.needs_input_grad[1] else None, None, *parameters


class NormMLPResidual(torch.autograd.Function):
    """RMSNorm, SwiGLU MLP with LoRA, plus the residual stream: x [N, C] -> [N, C].

    ``keep`` saves gate and up (57 KB a token of a 7B model) for the backward pass; otherwise they are made again, in
    pieces of ``chunk`` tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, norm: Norm, wide: Group, down: Group, keep: bool, chunk: int, *parameters: Tensor | None
    ) -> Tensor:
        """Computes the output and saves what the backward pass wants."""
        ctx.norm, ctx.wide, ctx.down, ctx.keep, ctx.chunk, ctx.parameters = norm, wide, down, keep, chunk, parameters
        first, second = _halves(wide, parameters)
        pieces = []
        saved: tuple[Tensor | None, ...] = ()
        for x in (x_NC,) if keep else x_NC.split(chunk):
            gate_up, xa = wide.forward(rms_norm(x, norm.weight_C, norm.eps), first)
            y, ha = down.forward(swiglu(gate_up), second, x)
            pieces.append(y)
            saved = (gate_up, xa, ha) if keep else ()
        ctx.save_for_backward(x_NC, *saved)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the inputs."""
        x_NC, *saved = ctx.saved_tensors
        if ctx.keep:
            grad, parameters = NormMLPResidual._piece(ctx, x_NC, grad_NC, *saved)
            return grad, None, None, None, None, None, *parameters
        grads: list[Tensor | None] = []
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for x, g in zip(x_NC.split(ctx.chunk), grad_NC.split(ctx.chunk), strict=True):
            first, _ = _halves(ctx.wide, ctx.parameters)
            gate_up, xa = ctx.wide.forward(rms_norm(x, ctx.norm.weight_C, ctx.norm.eps), first)
            grad, parameters = NormMLPResidual._piece(ctx, x, g, gate_up, xa, None)
            grads.append(grad)
            sums = [
                new if old is None else (old if new is None else old + new)
                for old, new in zip(sums, parameters, strict=True)
            ]
        joined = torch.cat([grad for grad in grads if grad is not None]) if grads[0] is not None else None
        return joined, None, None, None, None, None, *sums

    @staticmethod
    def _piece(
        ctx: Any, x: Tensor, grad: Tensor, gate_up: Tensor, xa: Tensor | None, ha: Tensor | None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients over a run of tokens: (of x or None, of every A and B)."""
        first, second = _halves(ctx.wide, ctx.parameters)
        down_a = ctx.down.a_RC(second, grad.dtype)
        grad_hidden = grad @ ctx.down.weight_OC(grad)
        ranked = ctx.down.ranked(second)
        if ranked:
            _, _, _, b, scale = ranked[0]
            gb = (grad @ b.to(grad.dtype)).mul_(scale)
            grad_hidden.addmm_(gb, down_a)
        grad_wide, hidden = swiglu_backward(gate_up, grad_hidden)
        second_grads: list[Tensor | None] = [None, None]
        if ranked:
            ha = hidden @ down_a.T if ha is None else ha
            second_grads = [(gb.T @ hidden).to(b.dtype), (grad.T @ ha).mul_(scale).to(b.dtype)]
        del hidden, grad_hidden
        normed = rms_norm(x, ctx.norm.weight_C, ctx.norm.eps)
        grad_normed, first_grads = ctx.wide.backward(grad_wide, normed, xa, first, ctx.needs_input_grad[0])
        if grad_normed is None:
            return None, [*first_grads, *second_grads]
        return rms_norm_backward(x, ctx.norm.weight_C, ctx.norm.eps, grad_normed, grad), [*first_grads, *second_grads]


def _halves(
    wide: Group, parameters: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    cut = 2 * len(wide.members)
    return parameters[:cut], parameters[cut:]
