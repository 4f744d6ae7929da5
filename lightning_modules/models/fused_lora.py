"""Frozen projections with LoRA, computed in groups, for :mod:`lightning_modules.models.fused_blocks`.

Shapes in names: N tokens, C input channels, O output channels of a group of projections, R ranks of its LoRA matrices
together.

What the plain path (PEFT over bitsandbytes modules) pays for and this does not:

- a group's projections (Q, K, V; gate, up) are one product, their LoRA A matrices another: bigger, fewer GEMMs;
- NF4 is dequantised once per use into a buffer that is freed at once: no saved dequantised weight;
- LoRA's product is written first and the base's accumulated onto it, where reading the buffer hides behind arithmetic:
  no separate buffer, no fp32 copies.

PEFT still owns the LoRA parameters: they are read from its modules at every call, so saving, loading and merging stay
PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.kernels.fp8 import Fp8Weight


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
