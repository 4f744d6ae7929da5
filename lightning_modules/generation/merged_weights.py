"""One 16-bit copy of a model's adapted and quantised layers, for the time of a generation.

A step of generation reads every weight to make one token a row. A layer in NF4 is dequantised at each of them, and an
adapter adds two small products to each layer: for a model of 135M parameters that is nearly all of the time. Here the
weight ``W + scale B A`` is computed once (in float32, then rounded to the type that the products have) and an ordinary
linear layer stands in the layer's place meanwhile. The trained tensors are not touched.

The copy takes 2 bytes a weight (13 GiB for Mistral-7B). Where the memory is not there the layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.models.backend import is_sharded

MEMORY_SHARE = 0.6  #: of the free memory that the copy may take; the rest is for keys, values and activations


@contextmanager
def merged(model: nn.Module) -> Iterator[bool]:
    """Puts merged copies in the place of adapted and 4-bit linear layers, and the layers back at the end.

    Layers that can't be merged exactly by ``W + scale B A`` stay: DoRA, an adapter that is switched off, 8-bit weights,
    4-bit ones that bitsandbytes has packed anew for a CPU at their first use. So do those divided over GPUs.

    Args:
        model: a transformers model, with or without PEFT adapters.

    Yields:
        Whether copies are in place; False where the memory is short or there is nothing to merge.
    """
    places = [(parent, name, child) for parent, name, child in _children(model) if _can_merge(child)]
    size = sum(_features(child) * _dtype(child).itemsize for _, _, child in places)
    if not places or size > MEMORY_SHARE * free_memory(_base(places[0][2]).weight.device):
        yield False
        return
    try:
        for parent, name, child in places:
            parent._modules[name] = _copy(child)
        yield True
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device: unused ones and those that PyTorch's allocator keeps for later."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 1 << 33  # no Linux: as much as the embedded model needs many times over


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every linear layer with its parent and name; what is inside an adapted layer is that layer's own."""
    for name, child in model.named_children():
        if _is_adapted(child) or isinstance(child, nn.Linear):
            yield model, name, child
        else:
            yield from _children(child)


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


def _features(module: Any) -> int:
    base = _base(module)
    return int(base.in_features * base.out_features)


def _dtype(module: Any) -> torch.dtype:
    weight: Any = _base(module).weight
    dtype: torch.dtype = weight.quant_state.dtype if _is_4bit(_base(module)) else weight.dtype
    return dtype


@torch.no_grad()
def _copy(module: Any) -> nn.Linear:
    base = _base(module)
    with torch.device("meta"):
        linear = nn.Linear(base.in_features, base.out_features, bias=False)
    linear.weight = nn.Parameter(_weight(module, base), requires_grad=False)
    linear.bias = base.bias
    return linear.eval()


def _weight(module: Any, base: Any) -> Tensor:
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
