"""Merged copies of adapted and quantised layers against the layers themselves."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_modules.generation import merged_weights
from lightning_modules.generation.merged_weights import free_memory, merged
from lightning_modules.models.backbone import Backbone, LoRA
from tests.helpers.byte_chat import CONTENTS, Bytes, load, one_by_one


def test_merged_copies_generate_as_the_layers_do_and_are_removed_afterwards(tiny_llama):
    model, chat = load(tiny_llama, adapter=True), Bytes()
    modules, state = list(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    expected = list(one_by_one(model, chat, CONTENTS, 9))
    with merged(model) as copied:
        assert copied
        assert not any("lora" in name for name, _ in model.named_parameters())
        assert list(one_by_one(model, chat, CONTENTS, 9)) == expected
    assert list(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_merged_without_memory_or_if_the_adapter_is_not_a_sum(tiny_llama, monkeypatch):
    with merged(load(tiny_llama)) as copied:
        assert not copied  # no adapter
    model = load(tiny_llama, adapter=True)
    with model.disable_adapter(), merged(model) as copied:
        assert not copied
    monkeypatch.setattr("lightning_modules.generation.merged_weights.free_memory", lambda device: 1000)
    with merged(model) as copied:
        assert not copied


def test_merged_4bit_layers_are_dequantised_once_with_the_adapter_added(tiny_llama):
    functional = pytest.importorskip("bitsandbytes").functional
    model = Backbone(str(tiny_llama), "nf4", "float32", lora=LoRA(rank=4, alpha=12)).build()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    weight = functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    expected = weight + 12 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with torch.no_grad(), merged(model.eval()) as copied:
        assert copied
        copy = model.get_base_model().model.layers[1].mlp.down_proj
        torch.testing.assert_close(copy.weight, expected)
        first = model(torch.arange(20)[None]).logits
    assert model.get_base_model().model.layers[1].mlp.down_proj is layer
    with torch.no_grad():  # bitsandbytes computes in bfloat16 here, and packs the weights for it
        torch.testing.assert_close(model(torch.arange(20)[None]).logits, first, rtol=0.1, atol=0.3)
    packed = getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
    with merged(model) as copied:
        assert copied is not packed  # repacked weights can't be dequantised any more


def test_a_merged_weight_is_the_base_plus_the_scaled_product(tiny_llama):
    model = load(tiny_llama, adapter=True)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = layer.base_layer.weight + layer.scaling["default"] * product
    with torch.no_grad(), merged(model):
        copy = model.get_base_model().model.layers[0].self_attn.q_proj
        assert type(copy) is nn.Linear
        assert not copy.weight.requires_grad
        torch.testing.assert_close(copy.weight, expected)
        untouched = model.get_base_model().model.layers[0].self_attn.k_proj
        assert untouched is dict(model.named_modules())["base_model.model.model.layers.0.self_attn.k_proj"]


def test_layers_are_restored_after_an_error(tiny_llama):
    model = load(tiny_llama, adapter=True)
    modules = list(model.named_modules())
    with pytest.raises(RuntimeError, match="stop"), merged(model):
        raise RuntimeError("stop")
    assert list(model.named_modules()) == modules


def test_dora_is_not_merged(tiny_llama):
    model = get_peft_model(load(tiny_llama), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with merged(model) as copied:
        assert not copied


def test_the_share_of_free_memory_decides(tiny_llama, monkeypatch):
    model = load(tiny_llama, adapter=True)
    # 2 layers of q_proj 64 x 64, v_proj 64 x 32 and down_proj 128 x 64, in float32
    size = 2 * (64 * 64 + 64 * 32 + 128 * 64) * 4
    for free, expected in ((size / merged_weights.MEMORY_SHARE + 8, True), (size, False)):
        monkeypatch.setattr(merged_weights, "free_memory", lambda device, free=free: free)
        with merged(model) as copied:
            assert copied is expected


def test_free_memory_without_proc_is_the_default(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError

    assert free_memory(torch.device("cpu")) > 0
    monkeypatch.setattr(merged_weights.Path, "read_text", missing)
    assert free_memory(torch.device("cpu")) == merged_weights.DEFAULT_MEMORY
