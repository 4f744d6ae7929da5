"""Causal LMs with seeded random weights, created layer by layer on their device.

For benchmarks and tests: speed and memory do not depend on the values of the weights, and no checkpoint of 14 GB is
needed. A linear layer is quantized before the next one is created, so that a 7B model in NF4 never takes more than its
5 GB.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

SEED = 0  #: of the weights, so that they are the same on every rank and in every run


def random_model(config: Any, *, quantization: str, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
    """Builds the architecture that a config describes.

    Args:
        config: a transformers config.
        quantization: nf4, int8 or none; the head stays in ``dtype``, as in transformers.
        dtype: of the weights that are not quantized, and of the products.
        device: of the weights.
        attention: implementation, see :class:`lightning_modules.models.backbone.Backbone`.

    Returns:
        The model in evaluation mode, with the initialization of transformers.
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
    model.tie_weights()  # a tied head shares the tensor of the embeddings again
    if quantization != "none":
        setattr(model, "is_loaded_in_4bit" if quantization == "nf4" else "is_loaded_in_8bit", True)
    return model.eval()


def quantize(linear: nn.Linear, quantization: str, dtype: torch.dtype) -> nn.Module:
    """Converts a linear layer to a layer of bitsandbytes: NF4 with double quantization, or LLM.int8."""
    import bitsandbytes as bnb

    device, weight = linear.weight.device, linear.weight.data
    shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if quantization == "nf4":
        new = bnb.nn.Linear4bit(*shape, bias, dtype, compress_statistics=True, quant_type="nf4", device="meta")
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new).to(device)
    else:
        new = bnb.nn.Linear8bitLt(*shape, bias, has_fp16_weights=False, threshold=6.0, device="meta")
        # Int8Params.to quantizes weights of the CPU only
        new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    if bias:
        new.bias = linear.bias
    new.requires_grad_(False)
    return cast(nn.Module, new)
