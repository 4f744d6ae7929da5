import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lightning_modules.models.fused_decoder import FusedDecoder

SHAPE = dict(  # noqa: C408 - reads as the call's keywords
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(kind, targets=TARGETS, layers=None, intermediate_size=88, **options):
    torch.manual_seed(1)
    base = (
        LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=intermediate_size, attn_implementation="sdpa"))
        if kind == "llama"
        else MistralForCausalLM(
            MistralConfig(**SHAPE, intermediate_size=intermediate_size, sliding_window=None, attn_implementation="sdpa")
        )
    )
    model = get_peft_model(
        base,
        LoraConfig(
            r=5, lora_alpha=11, target_modules=targets, layers_to_transform=layers, task_type="CAUSAL_LM", **options
        ),
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)  # PEFT begins with zeros: then half of the gradients would be zero
    return model


def packed_rows():
    """Two rows: one behind a prefix of 4, one packed plainly; segments, positions."""
    segments = torch.full((2, 19), -1)
    positions = torch.zeros(2, 19, dtype=torch.long)
    for row, layout in enumerate(([(0, 4), (1, 6), (2, 7)], [(1, 9), (2, 10)])):
        start, prefix = 0, layout[0][1] if layout[0][0] == 0 else 0
        for segment, length in layout:
            segments[row, start : start + length] = segment
            positions[row, start : start + length] = torch.arange(length) + (prefix if segment > 0 else 0)
            start += length
    return segments, positions


def plain(model, ids, positions, segments):
    """HF modules with PEFT, a dense mask: hidden states before the final norm."""
    place = torch.arange(ids.shape[1])
    same = segments[:, :, None] == segments[:, None]
    to_prefix = (segments[:, None] == 0) & (segments[:, :, None] > 0)
    mask = (place[:, None] >= place) & (same | to_prefix)
    seen = []
    decoder = model.get_base_model().model
    handle = decoder.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    decoder(input_ids=ids, position_ids=positions, attention_mask=mask[:, None], use_cache=False)
    handle.remove()
    return seen[0]


def run(model, memory, ids, positions, segments, rows=None):
    decoder = FusedDecoder(model, memory)
    return decoder.run(ids, positions, decoder.plan(segments), rows)


def gradients(model, hidden, segments):
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5)) * (segments >= 0)[..., None]
    model.zero_grad()
    (hidden * weight.to(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("memory", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize(
    ("targets", "layers"),
    [(TARGETS, None), (["q_proj", "v_proj", "down_proj"], None), (TARGETS, [1, 2]), (["up_proj"], [2])],
)
def test_equals_peft_over_hugging_face_modules(kind, memory, targets, layers):
    model = adapted(kind, targets, layers)
    segments, positions = packed_rows()
    ids = torch.randint(0, 97, segments.shape)
    expected = plain(model, ids, positions, segments)
    expected_grads = gradients(model, expected, segments)
    got = run(model, memory, ids, positions, segments).view(*ids.shape, -1)
    got_grads = gradients(model, got, segments)
    real = (segments >= 0)[..., None]
    torch.testing.assert_close(got * real, expected * real, rtol=1e-5, atol=1e-5)
    assert got_grads.keys() == expected_grads.keys() and got_grads
    for name, grad in got_grads.items():
        assert (grad - expected_grads[name]).norm() <= 1e-5 * expected_grads[name].norm(), name


@pytest.mark.parametrize("memory", ["none", "selective", "full", "offload"])
def test_some_positions_equal_the_same_of_all(memory):
    model = adapted("mistral")
    segments, positions = packed_rows()
    ids = torch.randint(0, 97, segments.shape)
    rows = torch.tensor([3, 9, 4, 20, 37])
    everywhere = run(model, memory, ids, positions, segments)[rows]
    expected = gradients(model, everywhere, torch.ones(len(rows)))
    there = run(model, memory, ids, positions, segments, rows)
    torch.testing.assert_close(there, everywhere)
    for name, grad in gradients(model, there, torch.ones(len(rows))).items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_nf4_base_equals_its_dequantised_weights():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    segments, positions = packed_rows()
    model = adapted("mistral")
    reference = copy.deepcopy(model)
    for wrapped, plain_layer in zip(model.modules(), reference.modules(), strict=True):
        if not hasattr(wrapped, "base_layer"):
            continue
        dense = wrapped.base_layer
        quantised = bitsandbytes.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type="nf4",
            compress_statistics=True,
        )
        quantised.weight = bitsandbytes.nn.Params4bit(
            dense.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        wrapped.base_layer = quantised.to("cpu")
        state = wrapped.base_layer.weight.quant_state
        assert state.nested
        restored = bitsandbytes.functional.dequantize_4bit(wrapped.base_layer.weight.data, state)
        plain_layer.base_layer.weight.data = restored.float()
    ids = torch.randint(0, 97, segments.shape)
    expected = plain(reference, ids, positions, segments)
    expected_grads = gradients(reference, expected, segments)
    for memory in ("none", "offload"):  # scales unnested once, and at every use
        got = run(model, memory, ids, positions, segments).view(*ids.shape, -1)
        got_grads = gradients(model, got, segments)
        for name, grad in got_grads.items():
            assert (grad - expected_grads[name]).norm() <= 1e-5 * expected_grads[name].norm(), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "DoRA"), ({"lora_dropout": 0.1}, "dropout"), ({"lora_bias": True}, "bias")],
)
def test_what_it_cannot_compute_is_refused_by_name(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        FusedDecoder(adapted("llama", **options))


def test_an_example_beyond_the_attention_window_is_refused():
    model = adapted("mistral")
    decoder = FusedDecoder(model)
    decoder.window = 8
    segments, positions = packed_rows()
    with pytest.raises(ValueError, match="window of 8"):
        decoder.run(torch.zeros_like(segments), positions, decoder.plan(segments))
