"""Export of a trained adapter as PEFT files or merged into a 16-bit model, and loading of an export.

An adapter corrects the weights that it was trained with. The weights of an NF4 base differ from their 16-bit originals
by several percent, so the adapter is merged into the dequantized NF4 weights, in float32, and the result is rounded
once. Merging into the 16-bit base is an option; the certificate reports its error. For GGUF see
:mod:`lightning_modules.export.gguf`.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from datamodules.errors import UserError
from datamodules.files import atomic_writer
from lightning_modules.models.backbone import Backbone

MergeBase = Literal["trained", "16bit"]
LoadAs = Literal["trained", "agent"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
GGUF_FILE = "model.gguf"
GGUF_ADAPTER = "adapter.gguf"  #: next to a 4-bit base
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def copy_adapter(source: Path, target: Path) -> None:
    """Copies the files of an adapter; each is complete as soon as it exists.

    Args:
        source: directory of the PEFT adapter.
        target: existing directory.

    Raises:
        UserError: ``source`` has no adapter, because the run trained every weight.
    """
    missing = [name for name in ADAPTER_FILES if not (source / name).is_file()]
    if missing:
        raise UserError(
            f"--format adapter: {source} has no adapter ({', '.join(missing)} missing), because the run trained every "
            "weight. Fix: use --format merged"
        )
    for name in ADAPTER_FILES:
        with (source / name).open("rb") as original, atomic_writer(target / name) as copy:
            shutil.copyfileobj(original, copy)


def merged_model(trained: Backbone, base: MergeBase, dtype: Dtype, device: torch.device) -> Any:
    """Builds a transformers model without adapter and quantization that computes the same as the trained model.

    Args:
        trained: base and adapter; without an adapter the weights of the model are only rounded.
        base: ``trained`` merges into the weights that were used in training (dequantized), ``16bit`` into the
            originals.
        dtype: of the result; ``auto`` is float16 for a float16 base and otherwise bfloat16, which can't overflow.
        device: device of the computation.

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


def load_exported(directory: Path, trained: Backbone, device: torch.device, load_as: LoadAs = "trained") -> Any:
    """Loads an export as its user will, with PEFT or transformers, in evaluation mode.

    A GGUF file is loaded with transformers, too, which tests its weights but not its tokenizer.

    Args:
        directory: directory of the export.
        trained: base of an adapter and its storage type.
        device: device of the weights.
        load_as: base of an adapter: ``trained`` is the base as in training, ``agent`` the one of sys-scan-graph's
            agent (NF4, float16).
    """
    if (directory / ADAPTER_FILES[0]).is_file():
        from peft import PeftModel

        base = replace(trained, adapter=None, lora=None)
        if load_as == "agent":
            base = replace(base, quantization="nf4", dtype="float16")
        return PeftModel.from_pretrained(base.build(device), str(directory)).eval()
    from transformers import AutoModelForCausalLM

    if (directory / GGUF_FILE).is_file():
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF_FILE, dtype=dtype).to(device)
        if (directory / GGUF_ADAPTER).is_file():  # only llama.cpp reads it; the PEFT adapter has the same numbers
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(trained.adapter))
        return model.eval()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", device_map={"": device}, use_safetensors=True)
    return model.eval()


def _target_dtype(dtype: Dtype, stored: torch.dtype) -> torch.dtype:
    if dtype == "auto":
        return torch.float16 if stored == torch.float16 else torch.bfloat16
    target: torch.dtype = getattr(torch, dtype)
    return target


def _merge_in_float32(model: nn.Module, target: torch.dtype) -> None:
    """Merges one layer at a time, so that only one is in float32, and rounds each weight once."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.to(torch.float32)
            module.merge(safe_merge=True)
            module.to(target)
