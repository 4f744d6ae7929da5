"""Bases, adapters, quantised layers and random weights that a Backbone builds, and its error messages."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from datamodules.errors import UserError
from lightning_modules.models.backbone import PROJECTIONS, Backbone, LoRA, out_of_memory_advice
from lightning_modules.models.random_init import quantize


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapted_layers(model):
    """Returns the names of the linear layers with an adapter, within the decoder's layers: '0.self_attn.q_proj', ..."""
    return {name.split("layers.")[1].split(".lora_A")[0] for name in trainable(model) if ".lora_A." in name}


def logits(model, ids=((1, 5, 9, 30),)):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits


@pytest.mark.parametrize("targets", [PROJECTIONS, "all-linear"])
def test_lora_is_on_all_seven_projections(tiny_llama, targets):
    model = Backbone(str(tiny_llama), lora=LoRA(rank=4, alpha=8, target_modules=targets)).build()
    layers = adapted_layers(model)
    assert {name.split(".")[-1] for name in layers} == set(PROJECTIONS)
    assert len(layers) == 14
    assert all(".lora_" in name for name in trainable(model))


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), "all-linear"])
def test_lora_on_the_top_layers_only(tiny_llama, targets):
    layers = adapted_layers(Backbone(str(tiny_llama), lora=LoRA(target_modules=targets, num_top_layers=1)).build())
    assert {name.split(".")[0] for name in layers} == {"1"}
    assert {name.split(".")[-1] for name in layers} == set(PROJECTIONS if targets == "all-linear" else targets)


def test_a_new_adapter_changes_no_output(tiny_llama):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = Backbone(str(tiny_llama), lora=LoRA()).build()
    assert torch.equal(logits(adapted), logits(base))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_has_its_own_type(tiny_llama, dtype):
    model = Backbone(str(tiny_llama), dtype="bfloat16", lora=LoRA(dtype=dtype)).build()
    assert {p.dtype for p in trainable(model).values()} == {getattr(torch, dtype)}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_dora_and_rslora(tiny_llama):
    model = Backbone(str(tiny_llama), lora=LoRA(rank=4, alpha=8, use_dora=True, use_rslora=True)).build()
    assert any("magnitude" in name for name in trainable(model))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 4**0.5


def test_without_lora_every_weight_is_trained(tiny_llama):
    model = Backbone(str(tiny_llama)).build()
    assert not isinstance(model, PeftModel)
    assert len(trainable(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_on_the_cpu(tiny_llama, quantization):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    exact = logits(Backbone(str(tiny_llama)).build())
    model = Backbone(str(tiny_llama), quantization=quantization, dtype="float32", lora=LoRA(rank=4)).build()
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype == (torch.uint8 if quantization == "nf4" else torch.int8)
    assert weight.numel() == 64 * 128 // (2 if quantization == "nf4" else 1)
    error = (logits(model) - exact).norm() / exact.norm()
    assert 0 < error < (0.15 if quantization == "nf4" else 0.02)
    model.train()(torch.tensor([[1, 5, 9]]), labels=torch.tensor([[1, 5, 9]])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model).values())


def test_quantised_without_lora_is_frozen(tiny_llama):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    assert not trainable(Backbone(str(tiny_llama), quantization="nf4", dtype="float32").build())


def test_nf4_is_double_quantised(tiny_llama):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    model = Backbone(str(tiny_llama), quantization="nf4", dtype="float32").build()
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert state.quant_type == "nf4"
    assert state.nested


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_random_weights(tiny_llama, tmp_path, quantization):
    if quantization != "none":
        pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    backbone = Backbone(f"random:{tmp_path}", quantization=quantization, dtype="float32", lora=LoRA(rank=4))
    first, second = backbone.build(), backbone.build()
    assert not any(p.is_meta for p in first.parameters())
    assert torch.equal(logits(first), logits(second))
    kinds = {"none": "Linear", "nf4": "Linear4bit", "int8": "Linear8bitLt"}
    assert type(first.get_base_model().model.layers[1].mlp.down_proj.base_layer).__name__ == kinds[quantization]
    assert type(first.get_output_embeddings()) is torch.nn.Linear
    assert len(adapted_layers(first)) == 14
    embeddings = first.get_input_embeddings().weight
    assert abs(embeddings.std() - first.config.initializer_range) < 0.002
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama)).model.rotary_emb.inv_freq
    assert torch.equal(first.get_base_model().model.rotary_emb.inv_freq, reference)


def test_random_weights_keep_tied_embeddings_tied(tiny_llama, tmp_path):
    config = json.loads((tiny_llama / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Backbone(f"random:{tmp_path}", dtype="float32").build()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_layer_approximates_the_original_one(quantization):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    linear = torch.nn.Linear(96, 40)
    x = torch.randn(5, 96)
    quantised = quantize(linear, quantization, torch.float32)(x)
    error = (quantised - linear(x)).norm() / linear(x).norm()
    assert 0 < error < (0.15 if quantization == "nf4" else 0.02)


def test_an_adapter_to_start_from(tiny_llama, tmp_path):
    first = Backbone(str(tiny_llama), lora=LoRA(rank=4, alpha=8)).build()
    for parameter in trainable(first).values():
        torch.nn.init.normal_(parameter, std=0.1)
    first.save_pretrained(tmp_path)
    second = Backbone(str(tiny_llama), adapter=str(tmp_path)).build()
    assert torch.equal(logits(first), logits(second))
    assert trainable(second).keys() == trainable(first).keys()
    with_dropout = Backbone(str(tiny_llama), adapter=str(tmp_path), lora=LoRA(rank=4, alpha=8, dropout=0.25)).build()
    assert with_dropout.peft_config["default"].lora_dropout == 0.25
    with pytest.raises(UserError, match=r"rank 8, but the adapter .* has 4"):
        Backbone(str(tiny_llama), adapter=str(tmp_path), lora=LoRA(rank=8, alpha=8)).build()


def test_the_adapter_names_its_base(tiny_llama):
    model = Backbone(str(tiny_llama), lora=LoRA()).build()
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_llama)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama):
    ids = torch.tensor([[1, 5, 9, 30]])
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = (
            Backbone(str(tiny_llama), lora=LoRA(rank=4), activation_checkpointing="full" if checkpointing else "none")
            .build()
            .train()
        )
        assert model.get_base_model().model.layers[0].gradient_checkpointing == checkpointing
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in trainable(model).values()])
    for kept, recomputed in zip(*grads, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name_or_path": "./nowhere/at/all"}, "no such folder"),
        ({"model_name_or_path": "unknown-user/has-this-model"}, "check the name and the network"),
        ({"lora": LoRA(target_modules=("qkv",))}, "lora.target_modules qkv does not fit the model; .*q_proj"),
        ({"lora": LoRA(rank=0)}, "lora"),
        ({"lora": LoRA(num_top_layers=3)}, "lora.num_top_layers 3: the model has 2 layers"),
        (
            {"lora": LoRA(use_dora=True), "quantization": "int8"},
            "use_dora=true: not supported with backbone.quantization=int8. Fix",
        ),
        (
            {"adapter": "unknown-user/has-this-adapter"},
            "backbone.adapter unknown-user/has-this-adapter: no PEFT adapter there",
        ),
    ],
)
def test_errors_name_the_setting(tiny_llama, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        Backbone(**{"model_name_or_path": str(tiny_llama)} | arguments).build()
    assert "\n" not in str(caught.value)


def test_weights_missing(tmp_path, tiny_llama):
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        Backbone(str(tmp_path)).build()


def test_without_bitsandbytes_quantisation_is_refused(tiny_llama, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"quantization nf4: bitsandbytes can't be used.*set backbone.quantization none"
    ):
        Backbone(str(tiny_llama), quantization="nf4").build()


def test_no_quantisation_on_a_tpu(tiny_llama):
    with pytest.raises(UserError, match=r"quantization nf4: bitsandbytes does not run on a TPU; set .* none"):
        Backbone(str(tiny_llama), quantization="nf4").build("xla")


def test_out_of_memory_names_the_settings_to_change():
    message = r"lower sequence_length 8192.*activation_checkpointing full.*quantization nf4"
    with pytest.raises(UserError, match=message), out_of_memory_advice("sequence_length 8192"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_shared_weights():
    student = Backbone("a", quantization="nf4", lora=LoRA())
    assert student.shares_weights_with(Backbone("a", quantization="nf4", adapter="x"))
    assert not student.shares_weights_with(Backbone("a", adapter="x"))
    assert not student.shares_weights_with(Backbone("b", quantization="nf4"))
