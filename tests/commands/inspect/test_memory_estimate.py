"""Memory and time estimates against measurements, and against models that are built."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from commands.inspect.memory_estimate import (
    DEVICES,
    GIB,
    Architecture,
    Setup,
    device_named,
    memory,
    provenance,
    seconds,
    trained_parameters,
)
from datamodules.errors import UserError
from lightning_modules.models.backbone import Backbone, LoRA

MISTRAL_7B = Architecture(4096, 4096, 1024, 14336, 32, 32, 32768)

# EXPERIMENTS.md: one H100, random NF4 Mistral-7B, LoRA r=64 on all seven projections in fp32, Lion
MEASURED = [
    (Setup("fused", "none", 1, 16_384, supervised=0.46), 52.92), (Setup("fused", "none", 1, 8_192), 29.16),
    (Setup("fused", "selective", 1, 16_384, supervised=0.46), 24.85),
    (Setup("fused", "full", 1, 16_384, supervised=0.46), 12.77),
    (Setup("fused", "offload", 1, 16_384, supervised=0.46), 7.15),
    (Setup("fused", "none", 1, 16_384, supervised=0.46, fp8=True), 65.96),
]  # fmt: skip


@pytest.mark.parametrize(("setup", "gib"), MEASURED)
def test_estimated_peaks_are_within_ten_percent_of_the_measured_ones(setup, gib):
    assert memory(MISTRAL_7B, replace(setup, state_bytes=4)).peak / GIB == pytest.approx(gib, rel=0.10)


def test_a_sharded_base_takes_the_share_of_a_rank_two_layers_and_the_unsharded_parts():
    single = memory(MISTRAL_7B, Setup("eager", "full", 1, 8192, quantization="none")).parts
    parts = memory(MISTRAL_7B, Setup("eager", "full", 1, 8192, quantization="none", ranks=8)).parts
    projections, rest = 2 * MISTRAL_7B.weights, 2 * MISTRAL_7B.rest
    assert single["base"] == projections + rest
    assert parts["base"] == pytest.approx(projections / 8 + projections / 32 * 2 + rest)
    assert all(parts[name] == single[name] / 8 for name in ("adapters", "gradients", "optimizer"))
    assert all(parts[name] == single[name] for name in ("activations", "logits"))


def test_mistral_7b_has_the_counted_parameters_of_adapters():
    assert trained_parameters(MISTRAL_7B, Setup("fused", "none", 1, 8192)) == 167_772_160


@pytest.mark.parametrize(
    ("checkpointing", "rate", "computed"),
    [("none", 17_804, 1e6), ("selective", 12_404, 7), ("full", 12_111, 3), ("offload", 8_527, 1)],
)
def test_the_measured_rates_are_reproduced(checkpointing, rate, computed):
    setup = Setup("fused", checkpointing, 1, 16_384)
    assert seconds(MISTRAL_7B, setup, DEVICES["h100"], tokens=computed) == pytest.approx(computed / rate)
    assert provenance(MISTRAL_7B, setup, DEVICES["h100"]) == "measured"


def test_time_scales_with_devices_rate_size_and_depth_of_the_backward_pass():
    setup, h100 = Setup("fused", "none", 1, 8192), DEVICES["h100"]
    whole = seconds(MISTRAL_7B, setup, h100, tokens=1e6)
    assert seconds(MISTRAL_7B, setup, h100, tokens=1e6, devices=4) == pytest.approx(whole / 4)
    assert seconds(MISTRAL_7B, setup, DEVICES["a100-80"], tokens=1e6) == pytest.approx(whole * 989 / 312)
    assert seconds(replace(MISTRAL_7B, layers=16), setup, h100, tokens=1e6) == pytest.approx(whole / 2)
    assert seconds(MISTRAL_7B, replace(setup, adapted_layers=8), h100, tokens=1e6) == pytest.approx(whole * 0.625)
    for device in ("a100-80", "v3-8", "cpu"):
        assert provenance(MISTRAL_7B, setup, DEVICES[device]).startswith("estimated")
    assert provenance(MISTRAL_7B, replace(setup, kernels="eager"), h100).startswith("estimated")


def test_two_cores_train_the_embedded_model_at_the_measured_rate():
    smollm2 = Architecture(576, 576, 192, 1536, 9, 30, 49152, tied=True)
    two_cores = replace(DEVICES["cpu"], tflops=2 * 0.148)
    setup = Setup("fused", "none", 1, 1024, quantization="none", compute_bytes=4, rank=16, adapted_layers=15)
    assert 1 / seconds(smollm2, setup, two_cores, tokens=1) == pytest.approx(200, rel=0.1)


def test_trained_parameters_equal_those_of_a_built_model(tiny_mistral):
    setups = {
        LoRA(rank=4): Setup("eager", "none", 1, 64, rank=4),
        LoRA(rank=3, num_top_layers=1, target_modules=("q_proj", "down_proj")): Setup(
            "eager", "none", 1, 64, rank=3, targets=("q_proj", "down_proj"), adapted_layers=1
        ),
        None: Setup("eager", "none", 1, 64, rank=0),
    }
    architecture = Architecture.of(AutoConfig.from_pretrained(tiny_mistral))
    for lora, setup in setups.items():
        model = Backbone(str(tiny_mistral), lora=lora).build()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained_parameters(architecture, setup) == trained


@pytest.mark.parametrize("folder", ["tiny_mistral", "tiny_llama"])
def test_bytes_of_the_base_equal_those_of_a_built_model(folder, request):
    config = AutoConfig.from_pretrained(request.getfixturevalue(folder))
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        stored = sum(p.numel() * p.element_size() for p in model.parameters())
        setup = Setup("eager", "none", 1, 64, quantization="none", compute_bytes=size)
        assert memory(Architecture.of(config), setup).parts["base"] == stored


def test_memory_grows_and_shrinks_with_the_settings():
    def peak(**changes):
        return memory(MISTRAL_7B, replace(Setup("fused", "none", 1, 8192), **changes)).peak

    ordered = [peak(activation_checkpointing=mode) for mode in ("offload", "full", "selective", "none")]
    assert ordered == sorted(ordered)
    assert peak(kernels="eager", activation_checkpointing="full") < peak(kernels="eager")
    assert peak(rows=2) == peak(sequence_length=16_384) > peak()
    assert peak(accumulates=True) == pytest.approx(peak() + 167_772_160 * 4)
    assert peak(quantization="none") > peak(quantization="int8") > peak()
    assert peak(adapted_layers=16) < peak(adapted_layers=None)
    assert (
        peak(kernels="eager", attention="eager")
        > peak(kernels="eager")
        > peak(kernels="eager", attention="flex_attention")
    )


def test_the_optimizer_step_is_the_peak_for_short_rows():
    short = memory(MISTRAL_7B, Setup("fused", "offload", 1, 16, rank=512))
    assert short.peak == short.moments["optimizer step"]
    long = memory(MISTRAL_7B, Setup("fused", "offload", 1, 16_384))
    assert long.peak == long.moments["backward pass of the first layer"] < sum(long.parts.values())


def test_errors_name_the_unknown_device_and_the_missing_field():
    with pytest.raises(UserError, match="--device h1000: unknown; there are h100"):
        device_named("h1000")
    assert device_named("H100") is DEVICES["h100"]
    with pytest.raises(ValueError, match="intermediate_size"):
        Architecture.of(SimpleNamespace(model_type="mamba", hidden_size=8))
