"""A LoRA adapter as GGUF, beside a base in 4 bits, for llama.cpp (``--lora``) and Ollama (``ADAPTER``).

An adapter's update is often smaller than half a step of a 4-bit grid. Merged before rounding, it is rounded away where
the base came from such a grid already (EXPERIMENTS.md: the embedded default lost all that it had learned). So the base
alone is rounded, and the adapter stays what it is, in float32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from datamodules.errors import UserError
from lightning_modules.export.gguf import rotary_rows, tensor_name


def write_gguf_adapter(source: Path, path: Path, config: Any) -> None:
    """Writes a PEFT adapter.

    Args:
        source: PEFT's folder.
        path: file to write.
        config: of the base; queries and keys are put in llama.cpp's rotary order by its numbers of heads.

    Raises:
        UserError: DoRA, or tensors that are no ``A`` or ``B`` of a layer that llama.cpp knows.
    """
    from gguf import GGUFWriter

    settings = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("use_dora"):
        raise UserError("--format gguf in 4 bits: llama.cpp has no DoRA adapters; use --gguf_type q8_0")
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    writer = GGUFWriter(path, "llama")
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", scale * rank)  # llama.cpp divides by the rank
        for key, tensor in load_file(source / "adapter_model.safetensors").items():
            writer.add_tensor(*_named(key, tensor, config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _named(key: str, tensor: torch.Tensor, config: Any) -> tuple[str, Any]:
    """``base_model.model.model.layers.7.mlp.up_proj.lora_A.weight`` -> ``blk.7.ffn_up.weight.lora_a`` and its array."""
    layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
    if part not in ("A.weight", "B.weight"):
        raise UserError(f"--format gguf in 4 bits: the adapter has {key}, which llama.cpp's has not; use q8_0")
    name = f"{tensor_name(f'{layer}.weight')}.lora_{part[0].lower()}"
    # only the rows of B are the layer's rows
    return name, (rotary_rows(f"{layer}.weight", tensor, config) if part[0] == "B" else tensor.float()).numpy()
