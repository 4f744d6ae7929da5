"""The fused decoder against PEFT over the modules of transformers, in every mode of activation checkpointing."""

import copy

import pytest
import torch

from datamodules.errors import UserError
from lightning_modules.models.backbone import PROJECTIONS
from lightning_modules.models.decoder import Decoder
from lightning_modules.models.fused_decoder import FusedDecoder, build_decoder
from lightning_modules.models.fused_lora import ProjectionGroup
from tests.helpers.fused_models import (
    VOCABULARY,
    adapted,
    assert_gradients_close,
    base_model,
    eager_hidden_states,
    gradients,
)
from tests.helpers.packed_rows import two_rows

MODES = ["none", "selective", "full", "offload"]
CPU = torch.device("cpu")


def run(model, mode, ids, positions, segments, selected=None):
    decoder = FusedDecoder(model, mode)
    return decoder.run(ids, positions, decoder.plan(segments), selected)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("targets", "layers"),
    [(PROJECTIONS, None), (["q_proj", "v_proj", "down_proj"], None), (PROJECTIONS, [1, 2]), (["up_proj"], [2])],
)
def test_equals_peft_over_modules_of_transformers(kind, mode, targets, layers):
    model = adapted(kind, targets, layers)
    segments, positions = two_rows()
    ids = torch.randint(0, VOCABULARY, segments.shape)
    expected = eager_hidden_states(model, ids, positions, segments)
    expected_gradients = gradients(model, expected, segments)
    got = run(model, mode, ids, positions, segments).view(*ids.shape, -1)
    real = (segments >= 0)[..., None]
    torch.testing.assert_close(got * real, expected * real, rtol=1e-5, atol=1e-5)
    assert_gradients_close(gradients(model, got, segments), expected_gradients)


@pytest.mark.parametrize("mode", MODES)
def test_selected_positions_equal_those_of_all_positions(mode):
    model = adapted("mistral")
    segments, positions = two_rows()
    ids = torch.randint(0, VOCABULARY, segments.shape)
    selected = torch.tensor([3, 9, 4, 20, 37])
    of_all = run(model, mode, ids, positions, segments)[selected]
    expected = gradients(model, of_all, torch.ones(len(selected)))
    got = run(model, mode, ids, positions, segments, selected)
    torch.testing.assert_close(got, of_all)
    assert_gradients_close(gradients(model, got, torch.ones(len(selected))), expected)


@pytest.mark.parametrize(
    ("mode", "in_forward", "recomputed"),
    [
        ("none", 12, 0),  # 3 layers of 4 groups of projections
        ("selective", 12, 3),  # gate and up of every layer
        ("full", 12, 12),
        ("offload", 12, 15),  # as full and selective
    ],
)
def test_products_that_the_backward_pass_recomputes(mode, in_forward, recomputed, monkeypatch):
    calls, forward = [], ProjectionGroup.forward
    monkeypatch.setattr(ProjectionGroup, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    model = adapted("llama")
    segments, positions = two_rows()
    hidden = run(model, mode, torch.zeros_like(segments), positions, segments)
    assert len(calls) == in_forward
    hidden.sum().backward()
    assert len(calls) - in_forward == recomputed


def test_layers_below_the_lowest_adapter_are_not_recomputed(monkeypatch):
    calls, forward = [], ProjectionGroup.forward
    monkeypatch.setattr(ProjectionGroup, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    segments, positions = two_rows()
    run(adapted("llama", layers=[2]), "full", torch.zeros_like(segments), positions, segments).sum().backward()
    assert len(calls) == 12 + 4


def kept_elements(mode):
    """Elements of the distinct tensors that autograd keeps between forward and backward, without parameters."""
    model = adapted("llama")
    segments, positions = two_rows()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = run(model, mode, torch.zeros_like(segments), positions, segments)
    hidden.sum().backward()
    return sum(kept.values())


def test_each_mode_keeps_less_and_full_keeps_the_inputs_of_the_layers():
    none, selective, full = (kept_elements(mode) for mode in ("none", "selective", "full"))
    tokens = 2 * 19
    assert full == tokens * (3 * 48 + 2 * 8)  # three inputs of 48 channels, cosines and sines of a head of 8
    # gate and up with x A^T and the output of SwiGLU with h A^T: 2 x 88 + 2 x 5 + 5 in each layer
    assert none - selective == tokens * 3 * (2 * 88 + 3 * 5)
    assert full < selective < none


def test_nf4_base_equals_its_dequantized_weights():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    segments, positions = two_rows()
    model = adapted("mistral")
    reference = copy.deepcopy(model)
    for wrapped, dense_layer in zip(model.modules(), reference.modules(), strict=True):
        if not hasattr(wrapped, "base_layer"):
            continue
        dense = wrapped.base_layer
        quantized = bitsandbytes.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4",
            compress_statistics=True,
        )  # fmt: skip
        quantized.weight = bitsandbytes.nn.Params4bit(
            dense.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        wrapped.base_layer = quantized.to("cpu")
        state = wrapped.base_layer.weight.quant_state
        assert state.nested
        restored = bitsandbytes.functional.dequantize_4bit(wrapped.base_layer.weight.data, state)
        dense_layer.base_layer.weight.data = restored.float()
    ids = torch.randint(0, VOCABULARY, segments.shape)
    expected = gradients(reference, eager_hidden_states(reference, ids, positions, segments), segments)
    for mode in ("none", "offload"):  # scales in fp32 once, and converted at every use
        got = run(model, mode, ids, positions, segments).view(*ids.shape, -1)
        assert_gradients_close(gradients(model, got, segments), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "DoRA"), ({"lora_dropout": 0.1}, "dropout"), ({"lora_bias": True}, "bias")],
)
def test_unsupported_adapters_raise_an_error_with_the_reason(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        FusedDecoder(adapted("llama", **options))


def test_an_example_longer_than_the_attention_window_raises_an_error():
    model = adapted("mistral")
    decoder = FusedDecoder(model)
    decoder.window = 8
    segments, positions = two_rows()
    with pytest.raises(ValueError, match="window of 8"):
        decoder.run(torch.zeros_like(segments), positions, decoder.plan(segments))


def test_auto_builds_fused_kernels_or_reports_why_not():
    decoder, line = build_decoder(adapted("llama"), "auto", "selective", CPU)
    assert type(decoder) is FusedDecoder
    assert line == "fused kernels for llama, activation_checkpointing selective"
    decoder, line = build_decoder(adapted("llama", lora_dropout=0.1), "auto", "offload", CPU)
    assert type(decoder) is Decoder
    assert line == (
        "eager kernels (the adapter has LoRA dropout > 0), activation_checkpointing full instead of offload"
    )
    decoder, line = build_decoder(adapted("llama"), "auto", "none", CPU, fused_unsupported_reason="it is sharded")
    assert type(decoder) is Decoder
    assert line == "eager kernels (it is sharded), activation_checkpointing none"


def test_options_that_need_fused_kernels_raise_an_error_without_them():
    with pytest.raises(UserError, match=r"kernels=fused: the embeddings are trained\. Fix: set it to auto or eager"):
        build_decoder(base_model("llama"), "fused", "none", CPU)
    with pytest.raises(UserError, match="kernels=fused: the device is xla"):
        build_decoder(adapted("llama"), "fused", "none", torch.device("xla"))
    for mode in ("selective", "offload"):
        with pytest.raises(UserError, match=f"activation_checkpointing={mode}: needs fused kernels"):
            build_decoder(adapted("llama"), "eager", mode, CPU)
