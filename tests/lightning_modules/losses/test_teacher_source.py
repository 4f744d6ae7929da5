"""Teachers in a training run: the base, an adapter on it, another model, and none."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from datamodules.errors import UserError
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, Distillation, LoRA
from tests.helpers.lm_training import (
    SGD,
    Data,
    assert_same,
    batch,
    examples,
    fit,
    module_for,
    one_by_one,
    quiet_trainer,
    row,
    trained,
)  # fmt: skip


def kl_by_hand(student, teacher, sequences, temperature=2.0):
    total, count = 0.0, 0
    for sequence, prompt in sequences:
        with torch.no_grad():
            s, t = (
                (m(sequence[None]).logits[0, prompt - 1 : -1] / temperature).log_softmax(-1) for m in (student, teacher)
            )
        total += float(torch.nn.functional.kl_div(s, t, log_target=True, reduction="sum"))
        count += len(sequence) - prompt
    return total / count


def adapter_folder(folder, path):
    """Saves an adapter of random weights in PEFT's format."""
    model = Backbone(str(folder), lora=LoRA(rank=2, alpha=4, dropout=0.3)).build()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["base", "adapter", "model"])
def test_teachers(kind, tiny_llama, tmp_path):
    adapter = adapter_folder(tiny_llama, tmp_path / "teacher")
    backbone = {"base": "base", "adapter": Backbone(str(tiny_llama), adapter=adapter)}.get(kind)
    if kind == "model":  # the same tokenizer, other weights
        other = AutoModelForCausalLM.from_pretrained(tiny_llama)
        for parameter in other.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        other.save_pretrained(tmp_path / "other")
        for file in tiny_llama.glob("token*"):
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        backbone = Backbone(str(tmp_path / "other"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    teacher = {
        "base": lambda: base,
        "adapter": lambda: PeftModel.from_pretrained(base, adapter),
        "model": lambda: other,
    }
    module = module_for(tiny_llama, Distillation(teacher=backbone, chunk_size=7), dropout=0.2)
    names, keys = set(dict(module.named_parameters())), set(module.state_dict())
    expected = kl_by_hand(copy.deepcopy(module.model).eval(), teacher[kind]().eval(), examples())
    results = quiet_trainer(tmp_path, enable_checkpointing=False).validate(module, Data(), verbose=False)[0]
    assert results["val/kl"] == pytest.approx(expected, abs=1e-6)
    assert results["val/loss"] == pytest.approx(0.5 * 4 * expected + 0.5 * results["val/ce"], abs=1e-5)
    before = {n: t.clone() for n, t in module.teacher_source.teacher.model.state_dict().items()}
    fit(module, one_by_one(), tmp_path, max_steps=3, accumulate_grad_batches=2)
    assert set(dict(module.named_parameters())) == names, "the teacher is in the parameters"
    assert set(module.state_dict()) == keys, "the teacher is in the checkpoint"
    model = module.teacher_source.teacher.model
    assert module.model.training
    assert not any(m.training for m in model.modules()), "the teacher is in training mode"
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), "the teacher was trained"
    shared = {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert bool(shared) == (kind != "model"), "base and adapter take no second copy of the weights"


def test_accumulation_with_a_teacher(tiny_llama, tmp_path):
    results = []
    for batches, accumulate in (([batch([row([e], 24) for e in examples()])], 1), (one_by_one(), 8)):
        module = module_for(tiny_llama, Distillation(chunk_size=5))
        trainer = fit(module, batches, tmp_path, accumulate_grad_batches=accumulate)
        results.append((trained(module), trainer.callback_metrics["train/kl"]))
    assert_same(results[0][0], results[1][0])
    assert torch.isclose(results[0][1], results[1][1])


def test_a_new_adapter_has_kl_0_to_its_base_and_no_gradient(tiny_llama, tmp_path):
    module = CausalLMModule(Backbone(str(tiny_llama), lora=LoRA(rank=4)), Distillation(alpha=1.0), SGD)
    trainer = fit(module, one_by_one(), tmp_path)
    assert abs(trainer.callback_metrics["train/kl"]) < 1e-6
    assert trainer.callback_metrics["train/grad_norm"] < 1e-6


def test_alpha_0_trains_as_without_a_teacher(tiny_llama, tmp_path):
    results = []
    for objective in (CompletionCrossEntropy(chunk_size=5), Distillation(alpha=0.0, chunk_size=5)):
        module = module_for(tiny_llama, objective)
        fit(module, one_by_one(), tmp_path, max_steps=4)
        assert module.teacher_source.teacher is None
        results.append(trained(module))
    assert_same(*results, atol=0)


def test_a_teacher_with_another_tokenizer_is_refused(tiny_llama, tiny_mistral, tmp_path):
    module = module_for(tiny_llama, Distillation(teacher=Backbone(str(tiny_mistral))))
    with pytest.raises(
        UserError, match=r"tokenizer differs .*259 tokens against 262; 259 of .* the first is '<\|endoft"
    ):
        fit(module, one_by_one(), tmp_path)


def test_the_base_as_a_teacher_needs_an_adapter(tiny_llama, tmp_path):
    module = CausalLMModule(Backbone(str(tiny_llama)), Distillation(), SGD)
    with pytest.raises(UserError, match=r"backbone\.lora is null"):
        fit(module, one_by_one(), tmp_path)
