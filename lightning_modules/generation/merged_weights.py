"""A 16-bit copy of a model's adapted and quantised layers, used during generation.

A step of generation reads every weight to compute one token per row. A layer in NF4 is dequantised in every step, and
an adapter adds two small products to each layer: for a model of 135M parameters that is nearly all of the time. Here
the weight ``W + scale B A`` is computed once (in float32, then rounded to the dtype of the products), and an ordinary
linear layer replaces the adapted or quantised layer meanwhile. The trained tensors do not change.

The copy takes 2 bytes per weight (13 GiB for Mistral-7B). If there is not enough memory, the layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.models.backend import is_sharded

MEMORY_SHARE = 0.6  #: fraction of the free memory for the copy; the rest is for keys, values and activations
DEFAULT_MEMORY = 1 << 33  #: bytes assumed free if the system does not report it: many times the embedded model's need


@contextmanager
def merged(model: nn.Module) -> Iterator[bool]:
    """Replaces adapted and 4-bit linear layers by merged copies, and restores the layers at the end.

    Layers that ``W + scale B A`` can't merge exactly stay: DoRA, an adapter that is switched off, 8-bit weights, and
    4-bit weights that bitsandbytes has repacked for a CPU at their first use. Layers divided over GPUs stay too.

    Args:
        model: a transformers model, with or without PEFT adapters.

    Yields:
        True if copies are in place; False if there is not enough memory or nothing to merge.
    """
    layers = [(parent, name, child) for parent, name, child in _linear_layers(model) if _can_merge(child)]
    size = sum(_num_weights(child) * _dtype(child).itemsize for _, _, child in layers)
    if not layers or size > MEMORY_SHARE * free_memory(_base(layers[0][2]).weight.device):
        yield False
        return
    try:
        for parent, name, child in layers:
            setattr(parent, name, _merged_copy(child))
        yield True
    finally:
        for parent, name, child in layers:
            setattr(parent, name, child)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that can be allocated on a device, including those that PyTorch's allocator caches."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return DEFAULT_MEMORY  # not Linux


def _linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yields every linear layer with its parent and name, but not the layers inside an adapted layer."""
    for name, child in model.named_children():
        if _is_adapted(child) or isinstance(child, nn.Linear):
            yield model, name, child
        else:
            yield from _linear_layers(child)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _base(module: Any) -> Any:
    return module.base_layer if _is_adapted(module) else module


def _can_merge(module: Any) -> bool:
    base = _base(module)
    if not isinstance(base, nn.Linear) or type(base.weight).__name__ == "Int8Params" or is_sharded(base.weight):
        return False
    if _is_4bit(base) and getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        return False
    if not _is_adapted(module):
        return _is_4bit(base)
    plain = not module.disable_adapters and not module.merged and not any(module.use_dora.values())
    return plain and all(name in module.lora_A for name in module.active_adapters)


def _is_4bit(base: Any) -> bool:
    return type(base.weight).__name__ == "Params4bit"


def _num_weights(module: Any) -> int:
    base = _base(module)
    return int(base.in_features * base.out_features)


def _dtype(module: Any) -> torch.dtype:
    weight: Any = _base(module).weight
    dtype: torch.dtype = weight.quant_state.dtype if _is_4bit(_base(module)) else weight.dtype
    return dtype


@torch.no_grad()
def _merged_copy(module: Any) -> nn.Linear:
    base = _base(module)
    with torch.device("meta"):
        linear = nn.Linear(base.in_features, base.out_features, bias=False)
    linear.weight = nn.Parameter(_merged_weight(module, base), requires_grad=False)
    linear.bias = base.bias
    return linear.eval()


def _merged_weight(module: Any, base: Any) -> Tensor:
    weight: Tensor = base.weight
    if _is_4bit(base):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
    if not _is_adapted(module):
        return weight
    total = weight.float()
    for name in module.active_adapters:
        total = total + module.get_delta_weight(name).to(total)
    return total.to(weight.dtype)
