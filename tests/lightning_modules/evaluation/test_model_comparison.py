"""Divergence against torch's, log-probabilities against a plain forward pass, and merges of every kind of LoRA."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from datamodules.tasks import RiskTask
from datamodules.tasks.base import Pair
from datamodules.tokenization.chat_format import ChatFormat
from lightning_modules.evaluation.model_comparison import Record, compare, divergence, expected_logprobs
from lightning_modules.export.merge import load_exported, merged_model
from lightning_modules.models.backbone import Backbone


@pytest.mark.parametrize("shape", [(1, 2), (64, 7), (65, 33), (130, 259)])
def test_divergence_is_kullback_leibler(shape):
    p = [torch.randn(shape).log_softmax(-1), torch.randn(3, shape[1]).log_softmax(-1)]
    q = [torch.randn(shape).log_softmax(-1), torch.randn(3, shape[1]).log_softmax(-1)]
    expected = [
        F.kl_div(b.double(), a.double(), log_target=True, reduction="none").sum(-1) for a, b in zip(p, q, strict=True)
    ]
    torch.testing.assert_close(divergence(p, q), torch.cat(expected))
    assert divergence(p, p).abs().max() == 0
    assert not torch.allclose(divergence(p, q), divergence(q, p))


def test_the_divergence_of_nan_predictions_is_none():
    nothing = Record([torch.full((2, 3), torch.nan)], ["a"], {})
    fine = Record([torch.zeros(2, 3).log_softmax(-1)], ["b"], {})
    figures = compare(fine, nothing)
    assert (figures["kl_mean"], figures["same_answers"], figures["tokens"]) == (None, 0, 2)


def test_log_probabilities_are_those_of_the_completion(tiny_llama, chatml_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).train()
    chat, task = ChatFormat(chatml_tokenizer), RiskTask()
    example = chat.encode(task, [Pair("risk", '{"title":"x"}', '{"severity":"low"}', "low", "", 1)])[0]
    logprobs_NV = expected_logprobs(model, example)
    ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.completion_ids])).long()[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(logprobs_NV, expected)


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}, {"layers_to_transform": [1]}])
def test_a_merged_model_equals_the_adapted_one(tmp_path, tiny_mistral, kind):
    base = AutoModelForCausalLM.from_pretrained(tiny_mistral, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], **kind))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    backbone = Backbone(model_name_or_path=str(tiny_mistral), dtype="float32", adapter=str(tmp_path / "adapter"))
    merged = merged_model(backbone, "trained", "float16", torch.device("cpu"))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float16}
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_exported(tmp_path / "merged", backbone, torch.device("cpu"))
    assert not isinstance(loaded, PeftModel)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        got = loaded.float()(ids).logits
        with adapted.disable_adapter():
            untuned = adapted(ids).logits
    error = (got - expected).abs().max()
    assert error < 0.02 * (untuned - expected).abs().max()
