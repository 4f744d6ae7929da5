"""Support by the fused kernels: traits read from a config equal those of the built model, and so does the decision."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.models.backbone import Backbone, LoRA
from lightning_modules.models.decoder import Decoder
from lightning_modules.models.fused_decoder import FusedDecoder, build_decoder
from lightning_modules.models.fused_support import MODEL_TYPES, ModelTraits, unsupported_reason

CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SUPPORTED = ModelTraits("llama", "silu", 64, 2)

#: (architecture, options of the config, settings of the backbone, part of the reason, None if supported)
CASES = [
    ("llama", {}, {}, None),
    ("mistral", {}, {}, None),
    ("mistral", {"sliding_window": 8}, {"dtype": "bfloat16"}, None),
    ("mistral", {"attention_bias": True}, {}, None),  # transformers ignores it: Mistral has no biases
    ("llama", {"head_dim": 20}, {"lora": LoRA(rank=2, use_rslora=True)}, None),
    ("llama", {"attention_bias": True}, {}, "bias"),
    ("llama", {"mlp_bias": True}, {}, "bias"),
    ("llama", {"hidden_act": "gelu"}, {}, "activation of the MLP is gelu"),
    ("qwen2", {}, {}, "architecture is qwen2"),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, {"lora": LoRA(target_modules="all-linear")}, "gpt2"),
    ("llama", {}, {"lora": LoRA(rank=2, use_dora=True)}, "DoRA"),
    ("llama", {}, {"lora": LoRA(rank=2, dropout=0.1)}, "dropout"),
    ("llama", {}, {"lora": None}, "embeddings are trained"),
    ("llama", {}, {"quantization": "nf4"}, None),
    ("llama", {}, {"quantization": "nf4", "lora": None}, None),  # frozen, as a teacher is
    ("llama", {}, {"quantization": "int8"}, "int8"),
    ("mistral", {"hidden_act": "relu"}, {"quantization": "nf4", "dtype": "float16"}, "relu"),
]  # fmt: skip


def save_model(folder, kind, options):
    config = AutoConfig.for_model(kind, **CONFIG | options)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "options", "settings", "reason"), CASES)
def test_config_and_built_model_have_the_same_traits_and_decoder(kind, options, settings, reason, tmp_path):
    if settings.get("quantization"):
        pytest.importorskip("bitsandbytes")
    folder = save_model(tmp_path, kind, options)
    backbone = replace(Backbone(str(folder), lora=LoRA(rank=2)), **settings)
    model = backbone.build()
    traits = ModelTraits.of_backbone(AutoConfig.from_pretrained(folder), backbone)
    if kind in MODEL_TYPES:  # of others, the architecture decides
        assert traits == ModelTraits.of_model(model)
    decoder, line = build_decoder(model, "auto", "none", torch.device("cpu"))
    expected = unsupported_reason(traits)
    if reason is None:
        assert expected is None
        assert type(decoder) is FusedDecoder
    else:
        assert reason in expected
        assert type(decoder) is Decoder
        assert line.startswith(f"eager kernels ({expected})")


@pytest.mark.parametrize(
    ("saved", "lora", "reason"),
    [
        ({}, None, None),
        ({"use_dora": True}, None, "DoRA"),
        ({"lora_dropout": 0.2}, None, "dropout"),
        ({"lora_dropout": 0.2}, LoRA(rank=3, alpha=6), None),  # the settings of the run replace the saved dropout
        ({"lora_bias": True}, None, "LoRA bias"),
        ({"modules_to_save": ["embed_tokens"]}, None, "embeddings are trained"),
    ],
)
def test_a_saved_adapter_has_the_traits_of_the_model_that_loads_it(saved, lora, reason, tmp_path):
    folder = save_model(tmp_path / "base", "llama", {})
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM", **saved)
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(adapter)
    backbone = Backbone(str(folder), adapter=str(adapter), lora=lora)
    traits = ModelTraits.of_backbone(AutoConfig.from_pretrained(folder), backbone)
    assert traits == ModelTraits.of_model(backbone.build())
    assert reason in unsupported_reason(traits) if reason else unsupported_reason(traits) is None


def test_several_active_adapters_are_not_supported(tmp_path):
    model = Backbone(str(save_model(tmp_path, "llama", {})), lora=LoRA(rank=2)).build()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    assert unsupported_reason(ModelTraits.of_model(model)) == "more than one adapter is active"


def test_another_method_of_peft_is_not_supported(tmp_path):
    from peft import IA3Config

    folder = save_model(tmp_path / "base", "llama", {})
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapter = tmp_path / "adapter"
    wrapped = get_peft_model(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    wrapped.save_pretrained(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "IA3"
    backbone = Backbone(str(folder), adapter=str(adapter))
    traits = ModelTraits.of_backbone(AutoConfig.from_pretrained(folder), backbone)
    assert "not plain LoRA" in unsupported_reason(traits)
    assert "not plain LoRA" in unsupported_reason(ModelTraits.of_model(wrapped))


@pytest.mark.parametrize(
    ("changes", "device_type", "reason"),
    [
        ({}, "cuda", None),
        ({}, "cpu", None),
        ({}, "xla", "the device is xla"),
        ({"dtype_bytes": 4}, "cuda", "16-bit weights, not 32-bit"),
        ({"dtype_bytes": 4}, "cpu", None),
        ({"head_dim": 80}, "cuda", "not 80"),
        ({"head_dim": 80}, "cpu", None),
    ],
)
def test_conditions_of_the_device(changes, device_type, reason):
    got = unsupported_reason(replace(SUPPORTED, **changes), device_type)
    assert reason in got if reason else got is None


def test_the_reason_of_a_strategy_comes_first():
    assert unsupported_reason(replace(SUPPORTED, int8=True), "xla", "the base is sharded") == "the base is sharded"
