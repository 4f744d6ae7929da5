"""Frozen projections with LoRA, computed in groups, for :mod:`lightning_modules.models.fused_blocks`.

Shapes in names: N tokens, C input channels, O output channels of a group of projections, R sum of the ranks of its LoRA
matrices.

Costs of the eager path (PEFT over bitsandbytes modules) that this module avoids:

- the projections of a group (Q, K, V; gate, up) are one product, their LoRA A matrices another: fewer, larger GEMMs;
- NF4 is dequantized once per use into a buffer that is freed after the product: no dequantized weight is saved;
- the product of LoRA is written first and the product of the base is accumulated into it, while arithmetic hides the
  time to read the buffer: no separate buffer, no fp32 copies.

PEFT still owns the LoRA parameters: they are read from its modules at every call, so that PEFT saves, loads and merges
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.kernels.fp8 import Fp8Weight


class FrozenWeight:
    """The frozen weight [out, in] of a projection, dense or NF4; :meth:`read` converts it to the compute dtype.

    Args:
        module: ``nn.Linear``, or bitsandbytes' ``Linear4bit`` (NF4 or FP4).
        undo_nesting: whether the scales of a double-quantized weight are kept in fp32 (0.4 GB more for 7B parameters, a
            third less time to dequantize).
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
            out.copy_(operator.default(*arguments))  # bitsandbytes has no out variant for the CPU


def _unnested_scales(state: Any) -> Tensor:
    """Computes the fp32 scales of a quantized weight from its quantized scales."""
    if not state.nested:
        return state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


@dataclass
class Projection:
    """One linear layer: a frozen weight and, if PEFT adapts it, A [r, in], B [out, r] and the scale of B A."""

    weight: FrozenWeight
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, module: Any, undo_nesting: bool = True) -> Projection:
        """Reads a linear layer, or a LoRA layer of PEFT around one.

        The layer must be supported, see :func:`lightning_modules.models.fused_support.unsupported_reason`.
        """
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        weight = FrozenWeight(base, undo_nesting)
        if base is module or not module.active_adapters:
            return cls(weight)
        (name,) = module.active_adapters
        if name not in module.lora_A:
            return cls(weight)
        return cls(weight, module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))


@dataclass
class ProjectionGroup:
    """Projections of the same input, computed as one product.

    Attributes:
        members: the projections, in the order of their outputs.
        sizes: number of output channels of each.
        fp8: weights of the base in FP8, after a call of :meth:`to_fp8`.
    """

    members: Sequence[Projection]
    sizes: list[int] = field(init=False)
    fp8: Fp8Weight | None = None

    def __post_init__(self) -> None:
        self.sizes = [member.weight.shape[0] for member in self.members]

    def to_fp8(self, dtype: torch.dtype) -> None:
        """Quantizes the weights of the base to FP8 for all later products; ``dtype`` is the type to quantize from."""
        module = self.members[0].weight.module
        self.fp8 = Fp8Weight.of(self.weight_OC(torch.empty(0, dtype=dtype, device=module.weight.device)))

    def without_adapter(self) -> ProjectionGroup:
        """Returns a group that shares the frozen weights, FP8 ones too, and has no LoRA."""
        return ProjectionGroup([Projection(member.weight) for member in self.members], fp8=self.fp8)

    def weight_OC(self, like: Tensor) -> Tensor:
        """Returns the weights of the base: dequantized into a new buffer, or a single dense weight itself."""
        first = self.members[0].weight
        if len(self.members) == 1 and first.state is None and first.module.weight.dtype == like.dtype:
            return first.module.weight
        buffer = like.new_empty(sum(self.sizes), first.shape[1])
        for member, out in zip(self.members, buffer.split(self.sizes), strict=True):
            member.weight.read(out)
        return buffer

    def parameters(self) -> list[Tensor | None]:
        """Returns A and B of every member, None if it is not adapted; an autograd function needs them as inputs."""
        return [parameter for member in self.members for parameter in (member.a, member.b)]

    def a_RC(self, parameters: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
        """Concatenates the A matrices of the members; None if no member is adapted."""
        matrices = [a.to(dtype) for a in parameters[::2] if a is not None]
        return torch.cat(matrices) if len(matrices) > 1 else (matrices[0] if matrices else None)

    def adapted_members(self, parameters: Sequence[Tensor | None]) -> list[tuple[int, slice, slice, Tensor, float]]:
        """Lists (index, its output channels, its ranks, B, scale) of each adapted member."""
        adapted, output, rank = [], 0, 0
        for index, (member, size) in enumerate(zip(self.members, self.sizes, strict=True)):
            b = parameters[2 * index + 1]
            if b is not None:
                ranks = slice(rank, rank + b.shape[1])
                adapted.append((index, slice(output, output + size), ranks, b, member.scale))
                rank = ranks.stop
            output += size
        return adapted

    def forward(
        self, x_NC: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the outputs [N, O] (plus ``residual``) and x A^T [N, R], which the backward pass needs."""
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
        """Adds x A^T B^T to the outputs in place; overwrites them if they are ``fresh`` (uninitialized)."""
        if xa_NR is None:
            return y_NO
        adapted = self.adapted_members(parameters)
        if fresh and len(adapted) < len(self.members):
            y_NO.zero_()
        for _, outputs, ranks, b, scale in adapted:
            y_NO[:, outputs].addmm_(xa_NR[:, ranks], b.to(y_NO.dtype).T, beta=0 if fresh else 1, alpha=scale)
        return y_NO

    def input_gradient(
        self, grad_NO: Tensor, parameters: Sequence[Tensor | None], need_input: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Computes the gradients of the input [N, C] (None if not needed) and of x A^T [N, R] (None without LoRA)."""
        a_RC, ga_NR = self.a_RC(parameters, grad_NO.dtype), None
        if a_RC is not None:
            ga_NR = grad_NO.new_empty(len(grad_NO), len(a_RC))
            for _, outputs, ranks, b, scale in self.adapted_members(parameters):
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
        """Computes the gradients of every A and B, in the order of :meth:`parameters`.

        Args:
            grad_NO: gradient of the outputs.
            ga_NR: gradient of x A^T, from :meth:`input_gradient`.
            x_NC: the input.
            xa_NR: x A^T, from :meth:`forward`; None recomputes it.
            parameters: A and B of every member.
        """
        grads: list[Tensor | None] = [None] * len(parameters)
        if ga_NR is None:
            return grads
        if xa_NR is None:
            xa_NR = x_NC @ self.a_RC(parameters, x_NC.dtype).T  # type: ignore[union-attr]
        grad_a = ga_NR.T @ x_NC
        for index, outputs, ranks, b, scale in self.adapted_members(parameters):
            grads[2 * index] = grad_a[ranks].to(b.dtype)
            grads[2 * index + 1] = (grad_NO[:, outputs].T @ xa_NR[:, ranks]).mul_(scale).to(b.dtype)
        return grads
