"""A teacher's hidden states with eager and fused kernels, and the projections to its width."""

import copy
from functools import partial

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from datamodules.errors import UserError
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, Distillation, HiddenMatch, LoRA
from lightning_modules.losses.teacher import build_teacher
from lightning_modules.models.backend import supervised_positions
from lightning_modules.models.fused_decoder import FusedDecoder, build_decoder
from tests.helpers.lm_training import (
    SGD,
    Data,
    assert_same,
    batch,
    examples,
    fit,
    loader_of,
    module_for,
    one_by_one,
    packed,
    quiet_trainer,
    row,
    trained,
)  # fmt: skip

SMALL_STEPS = partial(torch.optim.SGD, lr=1e-3)
LAYERS = {"layers.0": "layers.2", "layers.1": "layers.0"}


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory, chatml_tokenizer):
    """A wider and deeper model with the tokenizer of the tiny Llama."""
    folder = tmp_path_factory.mktemp("wide-llama")
    config = LlamaConfig(
        vocab_size=len(chatml_tokenizer), hidden_size=96, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    chatml_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_hidden_states_of_layers_equal_transformers(kernels, checkpointing, tiny_llama):
    """Rows packed after a prefix, against output_hidden_states of each example alone."""
    activation_checkpointing = "full" if checkpointing else "none"
    backbone = Backbone(str(tiny_llama), lora=LoRA(rank=4), activation_checkpointing=activation_checkpointing)
    model = backbone.build().train(checkpointing)
    decoder, _ = build_decoder(model, kernels, activation_checkpointing, torch.device("cpu"))
    rows = batch([row(examples(), 128, shared_prefix=True)])
    positions = supervised_positions(rows)
    hidden, states = decoder.hidden_states_of_layers(rows, positions, ["layers.1", "layers.0"])
    assert torch.equal(hidden, decoder.hidden_states_at(rows, positions))
    expected = []
    for sequence, prompt in examples():
        outputs = model.get_base_model().model(sequence[None], output_hidden_states=True)
        # transformers lists the embeddings first, and the last layer after the final norm
        expected.append((outputs.hidden_states[1][0, prompt - 1 : -1], outputs.last_hidden_state[0, prompt - 1 : -1]))
    torch.testing.assert_close(states[1], torch.cat([first for first, _ in expected]), rtol=1e-4, atol=1e-5)
    norm = model.get_base_model().model.norm
    torch.testing.assert_close(norm(states[0]), torch.cat([last for _, last in expected]), rtol=1e-4, atol=1e-5)
    states[1].square().sum().backward()
    layers = {name.split("layers.")[1][0] for name, p in model.named_parameters() if p.grad is not None}
    assert layers == {"0"} or all(
        p.grad.abs().max() == 0 for n, p in model.named_parameters() if p.grad is not None and "layers.1" in n
    )
    with pytest.raises(UserError, match=r"no layer layers\.7; the model has layers\.0 to layers\.1"):
        decoder.hidden_states_of_layers(rows, positions, ["layers.7"])


def matching_loss(student, teacher, sequences, project=lambda x: x):
    """Computes the mean over supervised tokens and matched layers, one example at a time."""
    total, count = 0.0, 0
    for sequence, prompt in sequences:
        states, targets = (layer_outputs(m, sequence) for m in (student, teacher))
        for student_layer, teacher_layer in LAYERS.items():
            s, t = project(states[student_layer])[prompt - 1 : -1], targets[teacher_layer][prompt - 1 : -1]
            total += float(((s - t) ** 2).mean(1).div((t**2).mean(1)).sum()) / len(LAYERS)
        count += len(sequence) - prompt
    return total / count


def layer_outputs(model, sequence):
    outputs, handles = {}, []
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for number, layer in enumerate(model.model.layers):
        handles.append(
            layer.register_forward_hook(lambda _, __, out, n=number: outputs.update({f"layers.{n}": out[0].detach()}))
        )
    with torch.no_grad():
        model(sequence[None])
    for handle in handles:
        handle.remove()
    return {name: state[0] if state.ndim == 3 else state for name, state in outputs.items()}


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_a_wider_teachers_projections_are_trained_saved_and_resumed(kernels, tiny_llama, wide_llama, tmp_path):
    def build():
        objective = Distillation(Backbone(str(wide_llama), kernels=kernels), hidden=HiddenMatch(LAYERS, 0.5))
        module = CausalLMModule(Backbone(str(tiny_llama), lora=LoRA(rank=4), kernels=kernels), objective, SMALL_STEPS)
        torch.manual_seed(1)
        module.configure_model()
        return module

    module = build()
    trainer = fit(module, one_by_one(), tmp_path, max_steps=1)
    eye = torch.eye(96, 64)
    expected = matching_loss(
        AutoModelForCausalLM.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(wide_llama),
        examples()[:1], lambda x: x @ eye.T,
    )  # fmt: skip
    assert float(trainer.callback_metrics["train/hidden"]) == pytest.approx(expected, rel=1e-4)
    assert [name for name in trained(module) if "projections" in name] == [f"projections.{n}.weight" for n in (0, 1)]
    assert all((project.weight - eye).abs().max() > 1e-6 for project in module.projections)

    uninterrupted, half = build(), build()
    fit(uninterrupted, one_by_one(), tmp_path, max_steps=4)
    stopped = fit(half, one_by_one(), tmp_path, max_steps=2)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert {name for name in saved if "projections" in name} == {f"projections.{n}.weight" for n in (0, 1)}
    assert not any("96" in str(tensor.shape) for name, tensor in saved.items() if "projections" not in name)
    resumed = build()
    resumed_trainer = fit_from(resumed, one_by_one()[2:], tmp_path, tmp_path / "half.ckpt")
    assert resumed_trainer.global_step == 4
    assert_same(trained(resumed), trained(uninterrupted))

    half.save_adapter(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert not any("projection" in name for name in PeftModel.from_pretrained(base, tmp_path / "adapter").state_dict())
    loaded = CausalLMModule.load_from_checkpoint(
        tmp_path / "half.ckpt"
    )  # generation needs no teacher and no projection
    assert loaded.projections is None


def fit_from(module, batches, tmp_path, checkpoint):
    """Resumes a run on the batches that are left: a loader of a list has no state of its own."""
    trainer = quiet_trainer(tmp_path, enable_checkpointing=False, max_steps=4)
    trainer.fit(module, loader_of([*batches]), ckpt_path=checkpoint)
    return trainer


def test_states_of_the_same_width_need_no_projection(tiny_llama, tmp_path):
    """A student with a new adapter equals its base: no difference, and no gradient."""
    objective = Distillation(alpha=1.0, hidden=HiddenMatch({"layers.0": "layers.0", "layers.1": "layers.1"}))
    module = CausalLMModule(Backbone(str(tiny_llama), lora=LoRA(rank=4)), objective, SGD)
    trainer = fit(module, one_by_one(), tmp_path)
    assert module.projections is None
    assert trainer.callback_metrics["train/hidden"] < 1e-9
    assert trainer.callback_metrics["train/grad_norm"] < 1e-6
    assert list(module.zero_sums()) == list(module.compute_sums(one_by_one()[0]))


def test_matching_does_not_depend_on_packing_prefix_or_accumulation(tiny_llama, wide_llama, tmp_path):
    results = []
    for batches, accumulate in (([packed()], 1), ([packed(False)], 1), (one_by_one(), 8)):
        objective = Distillation(Backbone(str(wide_llama)), hidden=HiddenMatch(LAYERS), chunk_size=5)
        torch.manual_seed(1)
        module = CausalLMModule(Backbone(str(tiny_llama), lora=LoRA(rank=4)), objective, SMALL_STEPS)
        module.configure_model()
        trainer = fit(module, batches, tmp_path, accumulate_grad_batches=accumulate)
        results.append((trained(module), trainer.callback_metrics))
    for weights, metrics in results[1:]:
        assert_same(weights, results[0][0], atol=2e-6)
        assert torch.isclose(metrics["train/hidden"], results[0][1]["train/hidden"], rtol=1e-5)


def test_an_unknown_layer_is_refused(tiny_llama, tmp_path):
    module = module_for(tiny_llama, Distillation(hidden=HiddenMatch({"layers.0": "layers.5"})))
    with pytest.raises(UserError, match=r"no layer layers\.5"):
        fit(module, one_by_one(), tmp_path)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_base_as_a_teacher_shares_the_weights_of_the_fused_decoder(fp8, tiny_llama):
    backbone = Backbone(str(tiny_llama), lora=LoRA(rank=4))
    model = backbone.build()
    student = FusedDecoder(model, fp8=fp8)
    teacher = build_teacher("base", backbone, model, torch.device("cpu"), student)
    assert isinstance(teacher.decoder, FusedDecoder)
    for student_layer, teacher_layer in zip(student.layers, teacher.decoder.layers, strict=True):
        for group, shared in zip(student_layer.groups(), teacher_layer.groups(), strict=True):
            assert [m.weight for m in shared.members] == [m.weight for m in group.members]
            assert shared.fp8 is group.fp8
            assert (shared.fp8 is not None) == fp8
            assert all(parameter is None for parameter in shared.parameters())
    rows, positions = packed(), supervised_positions(packed())
    untrained = student.hidden_states_at(rows, positions)  # B is zero: the adapter adds nothing yet
    assert torch.equal(teacher.predict(rows, positions).hidden_NC, untrained)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    assert torch.equal(teacher.predict(rows, positions).hidden_NC, untrained), "the teacher has the adapter"
    assert not torch.equal(student.hidden_states_at(rows, positions), untrained)
    assert not teacher.predict(rows, positions).hidden_NC.requires_grad


def test_prompts_padding_and_prefix_are_not_in_the_sums(tiny_llama, tmp_path):
    """The sums are those of the completions alone, independent of the tokens at unsupervised positions."""
    module = module_for(tiny_llama, Distillation(chunk_size=5))
    expected = {name: sum(module.compute_sums(b)[name] for b in one_by_one()) for name in ("loss", "kl", "ce", "count")}
    for rows in (packed(), packed(False)):
        sums = module.compute_sums(rows)
        assert int(sums["count"]) == sum(len(s) - p for s, p in examples())
        for name, value in expected.items():
            torch.testing.assert_close(sums[name], value, rtol=1e-5, atol=1e-5)
    longer = packed()
    padded = copy.copy(longer)
    for name in ("input_ids_BT", "position_ids_BT", "labels_BT", "segment_ids_BT"):
        fill = {"labels_BT": -100, "segment_ids_BT": -1}.get(name, 7)
        value = getattr(longer, name)
        setattr(padded, name, torch.cat([value, torch.full((2, 16), fill, dtype=value.dtype)], 1))
    torch.testing.assert_close(
        module.compute_sums(padded)["kl"], module.compute_sums(longer)["kl"], rtol=1e-5, atol=1e-5
    )


def test_plain_training_builds_no_teacher_and_no_projection(tiny_llama, tmp_path):
    module = module_for(tiny_llama, CompletionCrossEntropy())
    fit(module, Data().batches, tmp_path)
    assert module.teacher_source.teacher is None
    assert module.projections is None
