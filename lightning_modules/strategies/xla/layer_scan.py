"""The layers of a decoder as one loop: the compiler compiles one layer, not 32, in a fraction of the time.

Identical layers differ only in the values of their weights. The weights are stacked, and XLA's ``While`` runs one layer
over them. The backward pass is a loop as well: it recomputes a layer from its input, which is all that the forward pass
keeps, and computes the layer's gradients before those of the layer below. So this is gradient checkpointing too.
During a step each device holds its shards of the weights twice, separate and stacked.

Shapes in names: B rows, T tokens a row, C channels, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import custom_bwd, custom_fwd
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_modules.strategies.xla.compat import scan
from lightning_modules.strategies.xla.sharding import row_spec, weight_spec

if TYPE_CHECKING:
    from lightning_modules.strategies.xla.sharding import Sharding

    Layer = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]  # hidden states, other tensors, weights

STACKED_BYTES = 4 << 30  #: limit of a device's memory for stacked weights; a 7B model takes 1.8 GiB of a v3-8's core


class LayerScan(nn.ModuleList):
    """The layers of a transformers model, which slices the list and calls each item of the slice in order.

    A slice of this list holds loops over layers (:meth:`layer_calls`), so the model calls the loops. A layer with hooks
    is called separately, between two loops. All layers are called separately if their activations are kept, with
    dropout (the backward pass would draw other numbers), and on devices other than XLA.

    Args:
        layers: identical layers, see :func:`are_identical`.
        sharding: the placement of tensors on the mesh.
    """

    def __init__(self, layers: nn.ModuleList, sharding: Sharding) -> None:
        super().__init__(layers)
        self.sharding = sharding

    def __getitem__(self, index: Any) -> Any:
        """Returns one layer; for a slice, the result of :meth:`layer_calls` for its layers."""
        return self.layer_calls(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def layer_calls(self, layers: Sequence[nn.Module]) -> list[Callable[..., Tensor]]:
        """Returns the callables that compute the layers: one loop per run of layers without hooks, or single layers."""
        runs = [list(run) for _, run in groupby(layers, key=_is_hooked)]
        return [call for run in runs for call in ([partial(self._run_loop, run)] if _can_loop(run) else run)]

    def _run_loop(self, layers: list[nn.Module], hidden_BTC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the last layer's output [B, T, C]; other arguments are the same for all layers."""
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [value for value in leaves if isinstance(value, Tensor)]
        names, columns = zip(*_columns(layers), strict=True)

        def layer(hidden_BTC: Tensor, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
            remaining = iter(tensors)
            args, kwargs = tree_unflatten([next(remaining) if isinstance(v, Tensor) else v for v in leaves], structure)
            self._place([hidden_BTC], weights)
            named = dict(zip(names, weights, strict=True))
            with _without_checkpointing(layers[0]):
                output_BTC: Tensor = torch.func.functional_call(layers[0], named, (hidden_BTC, *args), kwargs)
            self._place([output_BTC], [])
            return output_BTC

        stacked = [torch.stack(column) for column in columns]  # L x a weight's shape
        for weights in stacked:
            self.sharding.constrain(weights, (None, *weight_spec(weights.shape[1:], self.sharding.fsdp)))
        if not torch.is_grad_enabled():
            return _scan_layers(layer, hidden_BTC, tensors, stacked)[0]
        output_BTC: Tensor = _LayerLoop.apply(layer, self._place, hidden_BTC, tensors, *stacked)
        return output_BTC

    def _place(self, rows: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Sets layouts within a loop; the compiler does not propagate them into it."""
        for tensor in rows:
            self.sharding.constrain(tensor, row_spec(tensor.ndim))
        for tensor in weights:
            self.sharding.constrain(tensor, weight_spec(tensor.shape, self.sharding.fsdp))


class _LayerLoop(torch.autograd.Function):
    """The loop over layers, which keeps each layer's input and recomputes the layer in the backward pass."""

    @staticmethod
    @custom_fwd(device_type="xla")
    def forward(
        ctx: Any, layer: Layer, place: Any, hidden_BTC: Tensor, tensors: list[Tensor], *stacked: Tensor
    ) -> Tensor:
        output_BTC, inputs_LBTC = _scan_layers(layer, hidden_BTC, tensors, stacked)
        ctx.save_for_backward(inputs_LBTC, *tensors, *stacked)
        ctx.layer, ctx.place, ctx.tensors = layer, place, len(tensors)
        return output_BTC

    @staticmethod
    @custom_bwd(device_type="xla")
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Any, ...]:
        inputs_LBTC, *others = ctx.saved_tensors
        tensors, stacked = others[: ctx.tensors], others[ctx.tensors :]
        trained = [index for index, wanted in enumerate(ctx.needs_input_grad[4:]) if wanted]

        def step(carry: list[Tensor], of_layer: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            grad_BTC, *tensors = carry
            hidden_BTC, *weights = (tensor.detach() for tensor in of_layer)
            leaves = [hidden_BTC, *(weights[index] for index in trained)]
            with torch.enable_grad():
                for leaf in leaves:
                    leaf.requires_grad_()
                output_BTC = ctx.layer(hidden_BTC, tensors, weights)
            grad_BTC, *grads = torch.autograd.grad(output_BTC, leaves, grad_BTC)
            ctx.place([grad_BTC], grads)
            return [grad_BTC, *tensors], grads

        (grad_BTC, *_), grads = scan(step, [grad_BTC, *tensors], [inputs_LBTC, *stacked], reverse=True)
        by_index = dict(zip(trained, grads, strict=True))
        return None, None, grad_BTC, None, *(by_index.get(index) for index in range(len(stacked)))


def _scan_layers(
    layer: Layer, hidden_BTC: Tensor, tensors: Sequence[Tensor], stacked: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs a layer over stacked weights; returns the last output [B, T, C] and the input of each layer [L, B, T, C]."""

    def step(carry: list[Tensor], weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden_BTC, *tensors = carry
        return [layer(hidden_BTC, tensors, weights), *tensors], [hidden_BTC]

    (output_BTC, *_), (inputs_LBTC,) = scan(step, [hidden_BTC, *tensors], list(stacked))
    return output_BTC, inputs_LBTC


@contextmanager
def _without_checkpointing(layer: Any) -> Iterator[None]:
    """Disables transformers' checkpointing: the loop itself recomputes a layer."""
    was, layer.gradient_checkpointing = layer.gradient_checkpointing, False
    try:
        yield
    finally:
        layer.gradient_checkpointing = was


def scan_layers(model: nn.Module, sharding: Sharding) -> None:
    """Replaces the layers of a transformers model by a loop, if they are identical and fit on a device twice."""
    lists = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    for parent, name, layers in lists:
        if not isinstance(layers, nn.ModuleList) or isinstance(layers, LayerScan) or not are_identical(layers):
            continue
        if sum(weight.nbytes for weight in layers.parameters()) <= STACKED_BYTES * sharding.fsdp:
            setattr(parent, name, LayerScan(layers, sharding))


def are_identical(layers: nn.ModuleList) -> bool:
    """Checks whether there are several layers that differ only in the values of their weights and in their index."""
    signatures = [_signature(layer) for layer in layers if hasattr(layer, "gradient_checkpointing")]
    return len(signatures) > 1 and all(signature == signatures[0] for signature in signatures)


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    settings = [
        (name, type(module), {k: v for k, v in vars(module).items() if k != "layer_idx" and _is_plain(v)})
        for name, module in layer.named_modules()
    ]
    return settings, [(name, t.shape, t.dtype, t.requires_grad) for name, t in _tensors(layer)]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters()
    yield from layer.named_buffers()


def _columns(layers: list[nn.Module]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yields the name of each weight in a layer, and that weight of every layer."""
    for entries in zip(*(_tensors(layer) for layer in layers), strict=True):
        yield entries[0][0], [tensor for _, tensor in entries]


def _can_loop(layers: Sequence[Any]) -> bool:
    on_xla = next(layers[0].parameters()).device.type == "xla"
    recomputed = not torch.is_grad_enabled() or layers[0].gradient_checkpointing
    dropped = any(module.training and _dropout(module) for module in layers[0].modules())
    return on_xla and recomputed and not dropped and not _is_hooked(layers[0])


def _is_hooked(layer: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def _dropout(module: Any) -> float:
    return module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
