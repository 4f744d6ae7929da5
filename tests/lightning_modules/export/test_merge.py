"""Tests of copied adapters, of merges against PEFT and against a plain formula, and of loading an export."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from datamodules.errors import UserError
from lightning_modules.export.gguf import write_gguf
from lightning_modules.export.merge import ADAPTER_FILES, GGUF_FILE, copy_adapter, load_exported, merged_model
from lightning_modules.models.backbone import Backbone
from tests.helpers.tiny_adapter import save_adapter

CPU = torch.device("cpu")
PROJECTION = "model.layers.0.self_attn.q_proj"


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 60)[None]).logits.float()


def update(folder):
    """Returns the update of a weight by its definition: alpha / rank * B A, in float32."""
    tensors = load_file(folder / ADAPTER_FILES[1])
    a_RI, b_OR = (tensors[f"base_model.model.{PROJECTION}.lora_{part}.weight"] for part in "AB")
    return 8 / 4 * b_OR @ a_RI


def test_a_copied_adapter_has_the_same_bytes(tmp_path, tiny_llama):
    save_adapter(tiny_llama, tmp_path / "adapter")
    (tmp_path / "copy").mkdir()
    copy_adapter(tmp_path / "adapter", tmp_path / "copy")
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == sorted(ADAPTER_FILES)
    for name in ADAPTER_FILES:
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_a_missing_adapter_is_a_user_error(tmp_path, tiny_llama):
    with pytest.raises(UserError, match=r"has no adapter \(adapter_config.json, .* Fix: use --format merged"):
        copy_adapter(tiny_llama, tmp_path)


@pytest.mark.parametrize(("stored", "dtype", "expected"), [
    ("float32", "auto", torch.bfloat16), ("float16", "auto", torch.float16), ("bfloat16", "auto", torch.bfloat16),
    ("float16", "float32", torch.float32), ("float32", "float16", torch.float16),
])  # fmt: skip
def test_the_result_has_the_requested_dtype(tiny_llama, stored, dtype, expected):
    merged = merged_model(Backbone(str(tiny_llama), dtype=stored), "trained", dtype, CPU)
    assert {parameter.dtype for parameter in merged.parameters()} == {expected}
    assert merged.config.dtype == expected
    assert not any(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_is_rounded_once(tmp_path, tiny_llama, dtype):
    """Base and update are added in float32, also for a 16-bit result; other weights are those of the base."""
    save_adapter(tiny_llama, tmp_path)
    merged = merged_model(Backbone(str(tiny_llama), dtype="float32", adapter=str(tmp_path)), "trained", dtype, CPU)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).state_dict()
    weights = merged.state_dict()
    expected = base[f"{PROJECTION}.weight"] + update(tmp_path)
    tolerance = {"rtol": 0, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(weights[f"{PROJECTION}.weight"].float(), expected, **tolerance)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights[name], base[name].to(weights[name].dtype))


def test_a_merge_uses_the_dequantized_base_of_training(tmp_path, tiny_llama):
    """The base of training is the NF4 one; ``16bit`` is the original, whose weights differ by several percent."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    save_adapter(tiny_llama, tmp_path)
    trained = Backbone(str(tiny_llama), "nf4", "float32", adapter=str(tmp_path))
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).state_dict()
    original = original[f"{PROJECTION}.weight"]
    packed, state = bitsandbytes.functional.quantize_4bit(original, quant_type="nf4", compress_statistics=True)
    rounded = bitsandbytes.functional.dequantize_4bit(packed, state)
    weights = {
        base: merged_model(trained, base, "float32", CPU).state_dict()[f"{PROJECTION}.weight"]
        for base in ("trained", "16bit")
    }
    torch.testing.assert_close(weights["trained"], rounded + update(tmp_path), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights["16bit"], original + update(tmp_path), rtol=0, atol=1e-6)
    assert (rounded - original).norm() > 0.02 * original.norm()


def test_an_exported_adapter_is_loaded_on_its_base(tmp_path, tiny_llama):
    expected = save_adapter(tiny_llama, tmp_path)
    loaded = load_exported(tmp_path, Backbone(str(tiny_llama), dtype="float32"), CPU)
    assert isinstance(loaded, PeftModel)
    assert not loaded.training
    torch.testing.assert_close(logits(loaded), logits(expected))


def test_an_adapter_is_loaded_as_the_agent_does(tmp_path, tiny_llama):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    save_adapter(tiny_llama, tmp_path)
    loaded = load_exported(tmp_path, Backbone(str(tiny_llama), dtype="float32"), CPU, "agent")
    layer = loaded.get_base_model().get_submodule(PROJECTION).base_layer
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.compute_dtype == torch.float16


def test_a_merged_export_is_loaded_in_its_stored_dtype(tmp_path, tiny_llama):
    expected = save_adapter(tiny_llama, tmp_path / "adapter")
    trained = Backbone(str(tiny_llama), dtype="float32", adapter=str(tmp_path / "adapter"))
    merged_model(trained, "trained", "bfloat16", CPU).save_pretrained(tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_exported(tmp_path / "merged", trained, CPU)
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    difference = (logits(loaded) - logits(expected)).norm()
    assert difference < 0.02 * logits(expected).norm()


def test_a_gguf_export_is_loaded_with_the_adapter_next_to_it(tmp_path, tiny_mistral, mistral_tokenizer):
    """With ``adapter.gguf`` the PEFT adapter is added, because transformers does not read GGUF adapters."""
    expected = save_adapter(tiny_mistral, tmp_path / "adapter")
    trained = Backbone(str(tiny_mistral), dtype="float32", adapter=str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tiny_mistral, dtype=torch.float32)
    base.config.sliding_window = None  # longer than the input; the format has none
    (tmp_path / "gguf").mkdir()
    write_gguf(base, mistral_tokenizer, tmp_path / "gguf" / GGUF_FILE, "tiny")
    without = load_exported(tmp_path / "gguf", trained, CPU)
    torch.testing.assert_close(logits(without), logits(base.eval()), rtol=0, atol=5e-3)  # rounded to float16
    (tmp_path / "gguf/adapter.gguf").touch()
    loaded = load_exported(tmp_path / "gguf", trained, CPU)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=0, atol=5e-3)
    assert (logits(expected) - logits(base)).abs().max() > 0.05
