"""Tests of GGUF adapters, read with the ``gguf`` package, against the update of the weights in PEFT."""

import json

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from datamodules.errors import UserError
from lightning_modules.export.gguf import rotary_rows, tensor_name
from lightning_modules.export.gguf_adapter import write_gguf_adapter
from tests.helpers.tiny_adapter import TARGETS, save_adapter


def read(path):
    reader = GGUFReader(path)
    return {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}, reader.fields


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}])
def test_base_plus_gguf_update_is_the_merged_weight(tmp_path, tiny_llama, options):
    """llama.cpp adds alpha / rank * B A, with the rows of queries and keys in its rotary order."""
    adapted = save_adapter(tiny_llama, tmp_path, rank=4, alpha=6, **options)
    config = AutoConfig.from_pretrained(tiny_llama)
    write_gguf_adapter(tmp_path, tmp_path / "adapter.gguf", config)
    tensors, fields = read(tmp_path / "adapter.gguf")
    scale = fields["adapter.lora.alpha"].contents() / 4
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).state_dict()
    merged = adapted.merge_and_unload().state_dict()
    changed = [key for key in merged if not torch.equal(merged[key], base[key])]
    layers = options.get("layers_to_transform", [0, 1])
    assert len(changed) == len(layers) * len(TARGETS)
    assert len(tensors) == 2 * len(changed)
    for key in changed:
        name = tensor_name(key)
        update = scale * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        stored = rotary_rows(key, base[key], config)
        torch.testing.assert_close(stored + update, rotary_rows(key, merged[key], config), rtol=0, atol=1e-6)
        assert update.abs().max() > 1e-3


def test_fields_declare_a_lora_adapter_of_llama(tmp_path, tiny_llama):
    save_adapter(tiny_llama, tmp_path)
    write_gguf_adapter(tmp_path, tmp_path / "adapter.gguf", AutoConfig.from_pretrained(tiny_llama))
    tensors, fields = read(tmp_path / "adapter.gguf")
    names = ("general.architecture", "general.type", "adapter.type")
    assert [fields[name].contents() for name in names] == ["llama", "adapter", "lora"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_dora_is_a_user_error(tmp_path, tiny_llama):
    save_adapter(tiny_llama, tmp_path, use_dora=True)
    with pytest.raises(UserError, match=r"does not support DoRA adapters\. Fix: use --gguf_type q8_0"):
        write_gguf_adapter(tmp_path, tmp_path / "adapter.gguf", AutoConfig.from_pretrained(tiny_llama))


def test_an_unsupported_tensor_is_a_user_error(tmp_path, tiny_llama):
    save_adapter(tiny_llama, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.score.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"tensor base_model.model.score.weight is not supported by llama.cpp"):
        write_gguf_adapter(tmp_path, tmp_path / "adapter.gguf", AutoConfig.from_pretrained(tiny_llama))


def test_the_scale_follows_the_adapters_config(tmp_path, tiny_llama):
    for rslora, alpha in ((False, 8.0), (True, 16.0)):  # llama.cpp divides by the rank of 4, rsLoRA by its square root
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        folder = tmp_path / str(rslora)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=rslora)
        get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
        assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"] == rslora
        write_gguf_adapter(folder, folder / "adapter.gguf", model.config)
        assert read(folder / "adapter.gguf")[1]["adapter.lora.alpha"].contents() == alpha
