"""Export of a LoRA adapter to GGUF, next to a 4-bit base, for llama.cpp (``--lora``) and Ollama (``ADAPTER``).

The update of an adapter is often smaller than half a step of a 4-bit grid. If it is merged before rounding and the base
was already on such a grid, the rounding removes it (EXPERIMENTS.md: the embedded default lost everything it had
learned). So only the base is rounded, and the adapter is stored in float32.
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
    """Writes a PEFT adapter to a GGUF file.

    Args:
        source: directory of the PEFT adapter.
        path: file to write.
        config: config of the base; its numbers of heads determine llama.cpp's rotary order of queries and keys.

    Raises:
        UserError: the adapter uses DoRA, or has a tensor that is not ``A`` or ``B`` of a layer that llama.cpp supports.
    """
    from gguf import GGUFWriter

    settings = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("use_dora"):
        raise UserError("--format gguf in 4 bits: llama.cpp does not support DoRA adapters. Fix: use --gguf_type q8_0")
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    writer = GGUFWriter(path, "llama")
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", scale * rank)  # llama.cpp divides by the rank
        for key, tensor in load_file(source / "adapter_model.safetensors").items():
            writer.add_tensor(*_gguf_tensor(key, tensor, config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _gguf_tensor(key: str, tensor: torch.Tensor, config: Any) -> tuple[str, Any]:
    """Returns the GGUF name of a tensor and its array.

    ``base_model.model.model.layers.7.mlp.up_proj.lora_A.weight`` -> ``blk.7.ffn_up.weight.lora_a``.
    """
    layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
    if part not in ("A.weight", "B.weight"):
        raise UserError(
            f"--format gguf in 4 bits: tensor {key} is not supported by llama.cpp. Fix: use --gguf_type q8_0"
        )
    name = f"{tensor_name(f'{layer}.weight')}.lora_{part[0].lower()}"
    # only the rows of B correspond to rows of the layer
    return name, (rotary_rows(f"{layer}.weight", tensor, config) if part[0] == "B" else tensor.float()).numpy()
