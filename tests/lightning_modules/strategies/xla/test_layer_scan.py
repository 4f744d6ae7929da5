"""The parts of the loop over layers that need no XLA device; test_spmd.py runs the loop."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_modules import Backbone, LoRA
from lightning_modules.strategies.xla.layer_scan import LayerScan, are_identical, scan_layers


@pytest.fixture(scope="module")
def tiny(tiny_mistral):
    return Backbone(str(tiny_mistral), lora=LoRA(rank=4), activation_checkpointing="full").build("cpu")


@pytest.fixture
def layers(tiny):
    return copy.deepcopy(tiny.get_base_model().model.layers)


def other_setting(layers):
    layers[1].self_attn.scaling = 0.5


def other_shape(layers):
    layers[1].mlp.up_proj.base_layer.weight = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def other_type(layers):
    layers[1].mlp.up_proj.lora_A.default.weight.data = torch.zeros(4, 64, dtype=torch.bfloat16)


def other_trained(layers):
    layers[1].mlp.up_proj.lora_A.default.weight.requires_grad_(False)


def other_module(layers):
    layers[1].post_attention_layernorm = nn.LayerNorm(64)


def one_layer(layers):
    del layers[1]


def test_layers_with_other_values_are_identical(layers):
    assert are_identical(layers)
    layers[1].mlp.up_proj.base_layer.weight.data += 1  # values may differ
    assert are_identical(layers)


@pytest.mark.parametrize("change", [other_setting, other_shape, other_type, other_trained, other_module, one_layer])
def test_layers_that_differ_are_not_identical(layers, change):
    change(layers)
    assert not are_identical(layers)


def test_the_loop_replaces_the_layers_and_keeps_their_names(tiny, tiny_mistral, monkeypatch):
    plain = AutoModelForCausalLM.from_pretrained(tiny_mistral)
    names, ids = list(tiny.state_dict()), torch.randint(5, 200, (2, 16))
    monkeypatch.setattr("lightning_modules.strategies.xla.layer_scan.STACKED_BYTES", 100_000)
    scan_layers(tiny, SimpleNamespace(fsdp=1))
    assert type(tiny.get_base_model().model.layers) is nn.ModuleList  # stacked weights would exceed the limit
    for _ in range(2):  # a teacher that shares the layers is placed a second time
        scan_layers(tiny, SimpleNamespace(fsdp=4))
    layers = tiny.get_base_model().model.layers
    assert isinstance(layers, LayerScan) and not isinstance(layers[0], LayerScan)
    assert list(tiny.state_dict()) == names
    assert layers[:2] == list(layers)  # on the host they are called one by one
    with torch.no_grad():
        torch.testing.assert_close(tiny.eval()(ids).logits, plain(ids).logits)


def test_a_layer_with_hooks_is_called_between_two_loops(monkeypatch):
    looped = []
    monkeypatch.setattr(
        "lightning_modules.strategies.xla.layer_scan._can_loop", lambda layers: not layers[0]._forward_hooks
    )
    monkeypatch.setattr(LayerScan, "_run_loop", lambda self, layers, hidden: looped.append(layers))
    layers = LayerScan(nn.ModuleList(nn.Linear(1, 1) for _ in range(5)), SimpleNamespace())
    layers[2].register_forward_hook(lambda *args: None)
    before, hooked, after = layers.layer_calls(list(layers))
    assert hooked is layers[2]
    assert layers[:5][1] is hooked, "a slice holds the calls"
    before(None), after(None)
    assert looped == [[layers[0], layers[1]], [layers[3], layers[4]]]
