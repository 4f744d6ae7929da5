"""A causal LM with seeded random weights, made layer by layer where it will live.

For benchmarks and tests: speed and memory do not depend on the weights' values, and no checkpoint of 14 GB is needed. A
linear layer is quantised before the next one is made, so that a 7B model in NF4 never takes more than its 5 GB.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

SEED = 0  #: of the weights: every rank and every run has the same ones


def random_model(config: Any, *, quantization: str, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
    """Builds the architecture that a config describes.

    Args:
        config: a transformers config.
        quantization: nf4, int8 or none; the head stays in ``dtype``, as transformers leaves it.
        dtype: of the weights that are not quantised, and of the products.
        device: where the weights are made.
        attention: implementation, see :class:`lightning_modules.models.backbone.Backbone`.

    Returns:
        The model in evaluation mode, initialised as transformers initialises it.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    head = model.get_output_embeddings()
    parents = {id(child): (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(SEED)
        for module in list(model.modules()):
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
            if quantization != "none" and type(module) is nn.Linear and module is not head:
                parent, name = parents[id(module)]
                setattr(parent, name, quantize(module, quantization, dtype))
    model.tie_weights()  # the head again shares the embeddings' tensor, where the config says so
    if quantization != "none":
        setattr(model, "is_loaded_in_4bit" if quantization == "nf4" else "is_loaded_in_8bit", True)
    return model.eval()


def quantize(linear: nn.Linear, quantization: str, dtype: torch.dtype) -> nn.Module:
    """Makes bitsandbytes' layer of a linear layer: NF4 with double quantisation, or LLM.int8."""
    import bitsandbytes as bnb

    device, weight = linear.weight.device, linear.weight.data
    shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if quantization == "nf4":
        new = bnb.nn.Linear4bit(*shape, bias, dtype, compress_statistics=True, quant_type="nf4", device="meta")
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)._quantize(device)
    else:
        new = bnb.nn.Linear8bitLt(*shape, bias, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)._quantize(device)
    if bias:
        new.bias = linear.bias
    new.requires_grad_(False)
    return cast(nn.Module, new)
