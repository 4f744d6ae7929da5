"""A teacher's hidden states on both paths, and the projections to its width: trained, saved, resumed, left out."""

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
from tests.lightning_modules.test_causal_lm import (
    PREFIX,
    SGD,
    Data,
    assert_same,
    batch,
    examples,
    fit,
    module_for,
    one_by_one,
    row,
    trained,
)

GENTLE = partial(torch.optim.SGD, lr=1e-3)
LAYERS = {"layers.0": "layers.2", "layers.1": "layers.0"}


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory, chatml_tokenizer):
    """The tiny Llama's tokenizer in a wider and deeper model."""
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


def packed(shared_prefix=True):
    return batch([row(examples()[:4], 64, shared_prefix), row(examples()[4:], 64)])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_named_layers_states_are_transformers_own(kernels, checkpointing, tiny_llama):
    """Packed behind a prefix, against output_hidden_states of each example alone."""
    recipe = Backbone(str(tiny_llama), lora=LoRA(rank=4), activation_checkpointing="full" if checkpointing else "none")
    model = recipe.build().train(checkpointing)
    memory = "low" if checkpointing else "full"
    decoder, _ = build_decoder(model, kernels, memory, torch.device("cpu"))
    rows = batch([row(examples(), 128, shared_prefix=True)])
    positions = supervised_positions(rows)
    hidden, states = decoder.hidden_states_of_layers(rows, positions, ["layers.1", "layers.0"])
    assert torch.equal(hidden, decoder.hidden_states_at(rows, positions))
    seen = []
    for sequence, prompt in examples():
        outputs = model.get_base_model().model(sequence[None], output_hidden_states=True)
        # transformers lists the embeddings first and the last layer behind the final norm
        seen.append((outputs.hidden_states[1][0, prompt - 1 : -1], outputs.last_hidden_state[0, prompt - 1 : -1]))
    torch.testing.assert_close(states[1], torch.cat([first for first, _ in seen]), rtol=1e-4, atol=1e-5)
    norm = model.get_base_model().model.norm
    torch.testing.assert_close(norm(states[0]), torch.cat([last for _, last in seen]), rtol=1e-4, atol=1e-5)
    states[1].square().sum().backward()
    layers = {name.split("layers.")[1][0] for name, p in model.named_parameters() if p.grad is not None}
    assert layers == {"0"} or all(
        p.grad.abs().max() == 0 for n, p in model.named_parameters() if p.grad is not None and "layers.1" in n
    )
    with pytest.raises(UserError, match=r"no layer layers\.7; the model has layers\.0 to layers\.1"):
        decoder.hidden_states_of_layers(rows, positions, ["layers.7"])


def by_hand(student, teacher, sequences, project=lambda x: x):
    """The mean over supervised tokens and matched layers, one example at a time."""
    total, count = 0.0, 0
    for sequence, prompt in sequences:
        ours, theirs = (watched(m, sequence) for m in (student, teacher))
        for ours_name, theirs_name in LAYERS.items():
            s, t = project(ours[ours_name])[prompt - 1 : -1], theirs[theirs_name][prompt - 1 : -1]
            total += float(((s - t) ** 2).mean(1).div((t**2).mean(1)).sum()) / len(LAYERS)
        count += len(sequence) - prompt
    return total / count


def watched(model, sequence):
    found, handles = {}, []
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for number, layer in enumerate(model.model.layers):
        handles.append(
            layer.register_forward_hook(lambda _, __, out, n=number: found.update({f"layers.{n}": out[0].detach()}))
        )
    with torch.no_grad():
        model(sequence[None])
    for handle in handles:
        handle.remove()
    return {name: state[0] if state.ndim == 3 else state for name, state in found.items()}


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_a_wider_teachers_projections_are_trained_saved_and_resumed(kernels, tiny_llama, wide_llama, tmp_path):
    def build():
        objective = Distillation(Backbone(str(wide_llama), kernels=kernels), hidden=HiddenMatch(LAYERS, 0.5))
        module = CausalLMModule(Backbone(str(tiny_llama), lora=LoRA(rank=4), kernels=kernels), objective, GENTLE)
        torch.manual_seed(1)
        module.configure_model()
        return module

    module = build()
    trainer = fit(module, one_by_one(), tmp_path, max_steps=1)
    eye = torch.eye(96, 64)
    expected = by_hand(
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
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "half.ckpt")  # to answer: no teacher, no projection
    assert loaded.projections is None


def fit_from(module, batches, tmp_path, checkpoint):
    from lightning.pytorch import Trainer

    trainer = Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        logger=False, enable_checkpointing=False, max_steps=4,
    )  # fmt: skip
    # the loader that was stopped at its second batch goes on with the third
    loader = torch.utils.data.DataLoader([*batches], batch_size=None, collate_fn=lambda b: b)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def test_states_of_the_same_width_need_no_projection(tiny_llama, tmp_path):
    """A fresh student of its own base: no difference, and no gradient."""
    objective = Distillation(alpha=1.0, hidden=HiddenMatch({"layers.0": "layers.0", "layers.1": "layers.1"}))
    module = CausalLMModule(Backbone(str(tiny_llama), lora=LoRA(rank=4)), objective, SGD)
    trainer = fit(module, one_by_one(), tmp_path)
    assert module.projections is None
    assert trainer.callback_metrics["train/hidden"] < 1e-9
    assert trainer.callback_metrics["train/grad_norm"] < 1e-6
    assert list(module._no_sums()) == list(module.compute_sums(one_by_one()[0]))


def test_neither_packing_nor_the_prefix_nor_accumulation_changes_matching(tiny_llama, wide_llama, tmp_path):
    results = []
    for batches, accumulate in (([packed()], 1), ([packed(False)], 1), (one_by_one(), 8)):
        objective = Distillation(Backbone(str(wide_llama)), hidden=HiddenMatch(LAYERS), chunk_size=5)
        torch.manual_seed(1)
        module = CausalLMModule(Backbone(str(tiny_llama), lora=LoRA(rank=4)), objective, GENTLE)
        module.configure_model()
        trainer = fit(module, batches, tmp_path, accumulate_grad_batches=accumulate)
        results.append((trained(module), trainer.callback_metrics))
    assert PREFIX > 0
    for weights, metrics in results[1:]:
        assert_same(weights, results[0][0], atol=2e-6)
        assert torch.isclose(metrics["train/hidden"], results[0][1]["train/hidden"], rtol=1e-5)


def test_a_name_that_is_no_layer_is_said(tiny_llama, tmp_path):
    module = module_for(tiny_llama, Distillation(hidden=HiddenMatch({"layers.0": "layers.5"})))
    with pytest.raises(UserError, match=r"no layer layers\.5"):
        fit(module, one_by_one(), tmp_path)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_base_as_a_teacher_shares_the_fast_decoders_weights(fp8, tiny_llama):
    recipe = Backbone(str(tiny_llama), lora=LoRA(rank=4))
    model = recipe.build()
    student = FusedDecoder(model, fp8=fp8)
    teacher = build_teacher("base", recipe, model, torch.device("cpu"), student)
    assert isinstance(teacher.decoder, FusedDecoder)
    for ours, theirs in zip(student.layers, teacher.decoder.layers, strict=True):
        for mine, its in zip(ours.groups(), theirs.groups(), strict=True):
            assert [m.weight for m in its.members] == [m.weight for m in mine.members]
            assert its.fp8 is mine.fp8
            assert (its.fp8 is not None) == fp8
            assert all(parameter is None for parameter in its.parameters())
    rows, positions = packed(), supervised_positions(packed())
    fresh = student.hidden_states_at(rows, positions)  # B is zero: the adapter adds nothing yet
    assert torch.equal(teacher.predict(rows, positions).hidden_NC, fresh)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    assert torch.equal(teacher.predict(rows, positions).hidden_NC, fresh), "the adapter reached the teacher"
    assert not torch.equal(student.hidden_states_at(rows, positions), fresh)
    assert not teacher.predict(rows, positions).hidden_NC.requires_grad


def test_prompts_padding_and_prefix_never_count(tiny_llama, tmp_path):
    """Whatever stands in unsupervised places of the labels' rows, sums are those of the completions alone."""
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
    assert module._teacher is None
    assert module.projections is None
