"""What the model's parts do on XLA: static shapes, pieces of each device's rows, checkpoints behind barriers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.models.backend import Backend
from lightning_modules.strategies.xla.layer_scan import scan_layers

if TYPE_CHECKING:
    from datamodules.batch import Batch
    from lightning_modules.strategies.xla.sharding import Sharding


GROUP_BYTES = 256 << 20  #: of whole copies that a device holds on their way to the host


class XLABackend(Backend):
    """See :class:`lightning_modules.models.backend.Backend`.

    Args:
        sharding: the mesh and how tensors lie on it.
        device: the one that PyTorch sees.
    """

    def __init__(self, sharding: Sharding, device: torch.device) -> None:
        self.sharding, self.device = sharding, device

    def check(self, quantization: str, teacher: bool = False) -> None:
        """Refuses bitsandbytes."""
        if quantization != "none":
            raise UserError(
                f"backbone.quantization {quantization}: bitsandbytes does not run on a TPU; set backbone.quantization "
                "none (and dtype bfloat16)"
            )

    def build_device(self, device: torch.device) -> torch.device:
        """The host: weights are divided on their way to the devices."""
        return torch.device("cpu")

    def place(self, model: nn.Module) -> None:
        """Divides weights over the devices, and has layers recomputed as XLA can, in a loop where they are alike."""
        self.sharding.place(model, self.device)
        self.use_own_checkpoints(model)
        scan_layers(model, self.sharding)

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collects tensors; see :meth:`collect`."""
        hosted: dict[str, Tensor] = self.collect(dict(tensors))
        return hosted

    def collect(self, data: Any) -> Any:
        """Copies all tensors of nested dictionaries and lists to the host.

        ``tensor.cpu()`` compiles a graph for each divided tensor, at each checkpoint anew. Here whole copies are made
        on the devices first, some at a time, by graphs that are compiled once.
        """
        divided: list[Tensor] = []
        apply_to_collection(
            data, Tensor, lambda tensor: divided.append(tensor) if tensor.device.type == "xla" else None
        )
        whole = iter([tensor for group in _groups(divided) for tensor in self._whole(group)])
        return apply_to_collection(data, Tensor, lambda tensor: next(whole) if tensor.device.type == "xla" else tensor)

    def _whole(self, tensors: list[Tensor]) -> list[Tensor]:
        import torch_xla

        with torch.no_grad():
            copies = [tensor.detach() * 1 for tensor in tensors]
        for whole in copies:
            self.sharding.annotate(whole, (None,) * whole.ndim)
        torch_xla.sync()
        hosted: list[Tensor] = torch_xla._XLAC._xla_get_cpu_tensors(copies)
        return hosted

    def generation_model(self, model: nn.Module) -> nn.Module:
        """A copy on the host, where answers of any length cost no compilation; it takes the weights' size of memory."""
        tensors = {id(tensor): tensor.detach() for tensor in (*model.parameters(), *model.buffers())}
        hosted = dict(zip(tensors, self.collect(list(tensors.values())), strict=True))

        def view(module: nn.Module) -> nn.Module:
            twin = copy.copy(module)
            twin._buffers = {
                name: value if value is None else hosted[id(value)] for name, value in module._buffers.items()
            }
            twin._parameters = {
                name: value if value is None else nn.Parameter(hosted[id(value)], requires_grad=False)
                for name, value in module._parameters.items()
            }
            twin._modules = {name: None if child is None else view(child) for name, child in module._modules.items()}
            return twin

        return view(model)

    def positions(self, batch: Batch) -> None:
        """All: their number is the same in every batch, and no row leaves its device. Costs the head on each token."""

    def split(self, tensor_N: Tensor, size: int) -> Sequence[Tensor]:
        """Cuts each device's part of the first axis, which no piece then has to be gathered for."""
        parts = tensor_N.unflatten(0, (self.sharding.devices, -1)).split(size, 1)
        return [part.flatten(0, 1) for part in parts]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Undoes :meth:`split`."""
        return torch.cat([piece.unflatten(0, (self.sharding.devices, -1)) for piece in pieces], 1).flatten(0, 1)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Recomputes behind a barrier, without which the compiler would find the same operations and keep them."""
        from torch_xla.utils.checkpoint import checkpoint

        return checkpoint(function, *args)

    def _checkpoint_layer(self, weights: list[nn.Parameter], function: Callable[..., Any], *args: Any) -> Any:
        hidden, *others = args
        trained = [weight for weight in weights if weight.requires_grad]
        return self.checkpoint(function, _GradientsFirst.apply(hidden, trained), *others)

    def use_own_checkpoints(self, model: nn.Module) -> None:
        """Replaces PyTorch's function in the layers of a transformers model that are checkpointed."""
        layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
        for layer in layers:
            if hasattr(layer, "_gradient_checkpointing_func"):
                recompute = partial(self._checkpoint_layer, list(layer.parameters()))
                setattr(layer, "_gradient_checkpointing_func", recompute)  # noqa: B010 (it is no tensor)
        if layers:  # reentrant: a layer's input must want a gradient, and frozen embeddings give none
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.register_forward_hook(_want_gradient)


class _GradientsFirst(torch.autograd.Function):
    """Has a layer's weight gradients computed before the backward pass goes on to the layer below.

    Nothing else waits for them, so the compiler would leave them to the end of the step and keep what they are made of:
    450 MB a layer of a 7B model with 8,192 tokens a core.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: list[nn.Parameter]) -> Tensor:
        ctx.weights = weights
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        import torch_xla.core.xla_model as xm

        grad = grad.clone()
        xm.optimization_barrier_([grad, *(weight.grad for weight in ctx.weights if weight.grad is not None)])
        return grad, None


def _on_xla(tensor: Tensor) -> bool:
    return tensor.device.type == "xla"


def _groups(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of some hundred megabytes together."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(t.nbytes for t in group) + tensor.nbytes > GROUP_BYTES:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _want_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)
