"""Random models: the same weights every time, the initialization of transformers, and quantized layers."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules.models.random_init import quantize, random_model

CPU = torch.device("cpu")


def config(**options):
    return LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip


def build(quantization="none", dtype=torch.float32, **options):
    return random_model(
        config(**options), quantization=quantization, dtype=dtype, device=CPU, attention="sdpa"
    )  # fmt: skip


def test_weights_are_the_same_every_time_and_leave_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = build().state_dict(), build().state_dict()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shapes_and_spread_are_those_of_transformers():
    model, reference = build(), LlamaForCausalLM(config())
    expected = reference.state_dict()
    state = model.state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}
    assert not model.training
    assert torch.equal(state["model.norm.weight"], torch.ones(64))
    assert float(state["model.layers.1.mlp.up_proj.weight"].std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_shares_the_embeddings(tied):
    model = build(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_buffers_are_computed_on_the_device():
    ids = torch.arange(12)[None]
    assert build()(ids).logits.isfinite().all()
    assert not any(tensor.is_meta for tensor in (*build().parameters(), *build().buffers()))


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_every_linear_layer_but_the_head_is_quantized(quantization, kind):
    pytest.importorskip("bitsandbytes")
    model = build(quantization, torch.bfloat16)
    names = [type(module).__name__ for module in model.model.modules() if hasattr(module, "in_features")]
    assert names == [kind] * 14
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight.dtype == torch.bfloat16
    assert getattr(model, "is_loaded_in_4bit" if quantization == "nf4" else "is_loaded_in_8bit")
    assert not any(p.requires_grad for layer in model.model.layers for p in layer.self_attn.parameters())


def test_nf4_weights_are_those_of_bitsandbytes_and_keep_their_statistics():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(128, 48)
    layer = quantize(linear, "nf4", torch.float32)
    packed, state = bitsandbytes.functional.quantize_4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    assert torch.equal(layer.weight.data.view(-1), packed.view(-1))
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax) and layer.weight.quant_state.nested
    assert layer.quant_state is layer.weight.quant_state
    assert layer.bias is linear.bias


def test_int8_weights_are_rounded_rows_with_a_scale():
    pytest.importorskip("bitsandbytes")
    linear = nn.Linear(128, 48, bias=False)
    weight = linear.weight.data.clone()
    layer = quantize(linear, "int8", torch.float32)
    assert layer.weight.data.dtype == torch.int8
    scale = weight.abs().amax(1)
    torch.testing.assert_close(layer.weight.SCB, scale, rtol=1e-3, atol=1e-5)
    restored = layer.weight.data.float() * scale[:, None] / 127
    torch.testing.assert_close(restored, weight, rtol=0, atol=float(scale.max()) / 127)
