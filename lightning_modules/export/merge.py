"""From a trained adapter to what others load: plain PEFT, one model of 16 bits, or GGUF (see ``gguf_export``).

An adapter corrects the very weights it was trained beside. Those of an NF4 base differ from the 16-bit ones that they
were made from by several percent, so a merge puts the adapter on the dequantised NF4 weights, in float32, and rounds
once. Merging on the 16-bit base is an option; the certificate says what it costs.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from datamodules.errors import UserError
from lightning_modules.models.backbone import Backbone

MergeBase = Literal["trained", "16bit"]
LoadAs = Literal["trained", "agent"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
GGUF_FILE = "model.gguf"
GGUF_ADAPTER = "adapter.gguf"  #: beside a base in 4 bits
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def copy_adapter(source: Path, target: Path) -> None:
    """Copies an adapter byte by byte.

    Raises:
        UserError: there is none, since the run trained every weight.
    """
    missing = [name for name in ADAPTER_FILES if not (source / name).is_file()]
    if missing:
        raise UserError(
            f"--format adapter: {source} holds no adapter ({', '.join(missing)} missing): the run trained every "
            "weight; use --format merged"
        )
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, target / name)


def merged_model(trained: Backbone, base: MergeBase, dtype: Dtype, device: torch.device) -> Any:
    """Builds a transformers model without adapter or quantisation that computes what the trained one does.

    Args:
        trained: base and adapter; without an adapter the model's own weights are rounded.
        base: trained merges on the weights as they were stored in training (dequantised), 16bit on the original.
        dtype: of the result; auto is float16 for a float16 base and bfloat16 for all others, which can't overflow.
        device: where to compute.

    Raises:
        UserError: the base can't be loaded.
    """
    quantization = trained.quantization if base == "trained" else "none"
    model = replace(trained, adapter=None, lora=None, quantization=quantization).build(device)
    if quantization != "none":
        model = model.dequantize()
    stored = model.get_input_embeddings().weight.dtype
    target = _target_dtype(dtype, stored)
    if trained.adapter is not None:
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(model, trained.adapter)
        _merge_in_float32(wrapped, target)
        model = wrapped.unload()
    model.requires_grad_(False)
    model = model.to(target)
    model.config.dtype = target
    return model


def load_exported(folder: Path, trained: Backbone, device: torch.device, load_as: LoadAs = "trained") -> Any:
    """Loads an export as its user will: plain PEFT or plain transformers, in evaluation mode.

    A GGUF file is read by transformers too, which tests its weights but not its tokenizer.

    Args:
        folder: what was written.
        trained: names the base of an adapter and how it is stored.
        device: where the weights go.
        load_as: of an adapter: beside the base as it was in training, or as sys-scan-graph's agent does it.
    """
    if (folder / ADAPTER_FILES[0]).is_file():
        from peft import PeftModel

        base = replace(trained, adapter=None, lora=None)
        if load_as == "agent":
            base = replace(base, quantization="nf4", dtype="float16")
        return PeftModel.from_pretrained(base.build(device), str(folder)).eval()
    from transformers import AutoModelForCausalLM

    if (folder / GGUF_FILE).is_file():
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=dtype).to(device)
        if (folder / GGUF_ADAPTER).is_file():  # only llama.cpp reads it: the same numbers from where they came
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(trained.adapter))
        return model.eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device}, use_safetensors=True)
    return model.eval()


def _target_dtype(dtype: Dtype, stored: torch.dtype) -> torch.dtype:
    if dtype == "auto":
        return torch.float16 if stored == torch.float16 else torch.bfloat16
    kind: torch.dtype = getattr(torch, dtype)
    return kind


def _merge_in_float32(model: nn.Module, target: torch.dtype) -> None:
    """Merges layer by layer, so that only one is in float32 at a time, and only once rounded."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.to(torch.float32)
            module.merge(safe_merge=True)
            module.to(target)
