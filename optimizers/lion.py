"""The Lion optimizer: the update is the sign of an interpolated momentum, with one state tensor per parameter.

Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Program 1. With gradient g, momentum m,
parameter p, learning rate η and decay λ::

    u = sign(β1 m + (1 - β1) g)
    p = p - η (u + λ p)
    m = β2 m + (1 - β2) g

Every entry moves by η independent of the size of its gradient. A rate for Lion is therefore 3 to 10 times smaller than
for AdamW, and the decay larger by the same factor, which keeps η λ (section 5 of the paper).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

HIGHEST_USUAL_LR = 5e-4  #: AdamW's usual rates for LoRA are 2e-4 to 1e-3, Lion's are 1e-5 to 3e-4


class Lion(Optimizer):
    """Lion with decoupled weight decay.

    The defaults are those of ``torch.optim.AdamW`` (1e-3 and 1e-2) converted with the paper's factor of 10. A step
    copies no value to the host, so it can be captured in a CUDA graph (with ``lr`` as a tensor) or traced by XLA.
    Parameters may be sharded over ranks (FSDP2).

    Args:
        params: parameters or parameter groups; a group may set ``lr``, ``betas`` and ``weight_decay``.
        lr: learning rate, a float or a tensor of one value.
        betas: coefficients of the momentum in the update, and in the new momentum.
        weight_decay: λ; a group of norm scales, biases or DoRA magnitudes sets 0: decay would only rescale a layer.
        master_weights: keeps a float32 copy of each bf16 or fp16 parameter, and its momentum in float32. Half a unit in
            the last place of a bf16 weight of 0.02 is 6e-5; without the copy, smaller steps are lost to rounding.
        foreach: one kernel over many tensors instead of one per tensor; the results are the same.

    Raises:
        ValueError: an argument out of range, or a parameter that is complex or not floating point.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
        master_weights: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "betas": tuple(betas), "weight_decay": weight_decay,
            "master_weights": master_weights, "foreach": foreach,
        }  # fmt: skip
        super().__init__(params, defaults)
        rates = [group["lr"] for group in self.param_groups if not _on_accelerator(group["lr"])]
        if any(rate > HIGHEST_USUAL_LR for rate in rates):
            warnings.warn(
                f"Lion: lr {max(map(float, rates)):g} looks like a rate for AdamW; Lion moves every weight by lr, so "
                "divide it by 3 to 10 and multiply weight_decay by the same factor",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and validates its options."""
        super().add_param_group(param_group)
        _check_options(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The result of the closure; None without one.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = _foreach_lion if group["foreach"] else _single_lion
            beta1, beta2 = group["betas"]
            for params, grads, moments in self._tensors(group):
                update(params, grads, moments, group["lr"], beta1, beta2, group["weight_decay"])
            self._round_masters(group)
        return loss

    def create_state(self) -> None:
        """Creates the state that the first step would create; XLA would compile that step separately."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param, group["master_weights"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state. The float32 state of a parameter with a master copy stays float32; torch would round it."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, param in zip(indices, params, strict=True):
            saved = state_dict["state"].get(index, {})
            if "master" in saved:
                self.state[param] = {key: value.to(param.device, copy=True) for key, value in saved.items()}

    def _tensors(self, group: dict[str, Any]) -> Iterable[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """Yields a group's (weights to step, gradients, momenta), each triple of one device and type."""
        kinds: dict[Any, tuple[list[Tensor], list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], [], []))
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise ValueError(f"Lion: a gradient of shape {tuple(param.grad.shape)} is sparse; use sparse=False")
            state = self._state_of(param, group["master_weights"])
            weight = state.get("master", param)
            row = kinds[param.device, weight.dtype, param.grad.dtype]
            for column, tensor in zip(row, (weight, param.grad, state["momentum"]), strict=True):
                column.append(_local(tensor))
        return kinds.values()

    def _state_of(self, param: Tensor, master_weights: bool) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            if master_weights and param.dtype in (torch.bfloat16, torch.float16):
                state["master"] = param.detach().float().clone(memory_format=torch.preserve_format)
            weight = state.get("master", param.detach())
            state["momentum"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state

    def _round_masters(self, group: dict[str, Any]) -> None:
        """Copies the float32 weights, rounded, into the parameters that the model uses."""
        pairs = [
            (_local(param), _local(self.state[param]["master"]))
            for param in group["params"]
            if param.grad is not None and "master" in self.state[param]
        ]
        if pairs and group["foreach"]:
            torch._foreach_copy_([param for param, _ in pairs], [master for _, master in pairs])
        else:
            for param, master in pairs:
                param.copy_(master)


def _single_lion(
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Steps one tensor after the other, in the notation of the paper."""
    for param, grad, moment in zip(params, grads, moments, strict=True):
        grad = grad.to(moment.dtype)
        update = torch.lerp(moment, grad, 1 - beta1).sign_()
        if weight_decay:
            param.mul_(1 - _to(lr, param) * weight_decay)
        param.sub_(update.mul_(_to(lr, param)))
        moment.lerp_(grad, 1 - beta2)


def _foreach_lion(
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Steps all tensors together: five kernels, and one buffer as large as the parameters."""
    if grads[0].dtype != moments[0].dtype:
        wide = [torch.empty_like(moment) for moment in moments]
        torch._foreach_copy_(wide, grads)
        grads = wide
    updates = torch._foreach_lerp(moments, grads, 1 - beta1)
    torch._foreach_sign_(updates)
    lr = _to(lr, params[0])
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(params, updates)
    torch._foreach_lerp_(moments, grads, 1 - beta2)


def _local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of an FSDP2 DTensor, or the tensor itself: a step is element-wise."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _to(lr: float | Tensor, like: Tensor) -> Any:
    """Returns a rate on the parameter's device; a captured CUDA graph can't read a tensor on the host."""
    return lr.to(like.device, non_blocking=True) if isinstance(lr, Tensor) else lr


def _on_accelerator(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _check_options(group: dict[str, Any]) -> None:
    lr, betas, weight_decay = group["lr"], group["betas"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Lion: lr has shape {tuple(lr.shape)}; give one value")
    if not _on_accelerator(lr) and not lr >= 0:
        raise ValueError(f"Lion: lr {lr} is negative; give a rate such as 1e-4")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"Lion: betas {betas} must be two numbers in [0, 1), such as (0.9, 0.99)")
    if not weight_decay >= 0:
        raise ValueError(f"Lion: weight_decay {weight_decay} is negative; give 0 for none")
    for param in group["params"]:
        if not param.is_floating_point():
            raise ValueError(
                f"Lion: a parameter of type {param.dtype} is not floating point. Fix: train real-valued parameters only"
            )
