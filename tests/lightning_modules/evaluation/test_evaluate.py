"""Answers and likelihoods of pairs against their plain counterparts, and the figures of predictions by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from datamodules.records import SEVERITIES
from datamodules.tasks import RiskTask
from datamodules.tasks.base import Pair, compact_json
from datamodules.tokenization.chat_format import ChatFormat
from lightning_modules.evaluation.evaluate import (
    PredictionResult,
    answer_pairs,
    differences,
    forced_severities,
    score_predictions,
    token_limit,
)
from lightning_modules.generation.encoded_pairs import EncodedPairs
from lightning_modules.generation.engine import generate
from tests.helpers.byte_chat import (
    CONTENTS,
    TASK,
    AllowedTokens,
    Bytes,
    end_that_occurs,
    load,
    one_by_one,
    plain_logprob,
)


def make_pairs(severities=("low", "high", "info")):
    pairs = []
    for number, severity in enumerate(severities):
        answer = {"tags": ["t"] * number, "severity": severity, "risk_score": 10 * number}
        content = compact_json({"title": "x" * number})
        pairs.append(Pair("risk", content, compact_json(answer), severity, ("network", "ioc")[number % 2], 1))
    return pairs


def byte_pairs():
    return [
        SimpleNamespace(content=c, completion=f'{{"n":{i},"severity":"low"}}', severity="low")
        for i, c in enumerate(CONTENTS)
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_greedy_generation(tiny_llama, batch_size):
    model, pairs = load(tiny_llama), byte_pairs()
    chat = Bytes(eos_id=end_that_occurs(model, 6))
    encoded = EncodedPairs.encode(chat, TASK, pairs)
    fractions = []
    results = answer_pairs(model, encoded, max_new_tokens=6, batch_size=batch_size, progress=fractions.append)
    expected = list(one_by_one(model, chat, CONTENTS, 6))
    for result, (tokens, stopped), example in zip(results, expected, encoded.examples, strict=True):
        assert (result.text, result.complete) == (chat.decode(tokens), stopped)
        assert (result.forced, result.constrained, result.prompt_tokens_cut) == ("", None, 0)
        assert result.tokens == len(example.completion_ids)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_likelihoods_are_those_of_the_expected_answers(tiny_llama):
    model, chat, pairs = load(tiny_llama), Bytes(), byte_pairs()
    encoded = EncodedPairs.encode(chat, TASK, pairs)
    for result, prompt, completion in zip(
        answer_pairs(model, encoded, max_new_tokens=1), encoded.prompts, encoded.completions, strict=True
    ):
        assert result.nll == pytest.approx(-plain_logprob(model, prompt, completion), rel=1e-5)


def test_every_prompt_is_encoded_once(tiny_llama):
    """Token limit, likelihood, forced choice, free and constrained generation use the ids of one encoding."""
    model, chat = load(tiny_llama), Bytes(eos_id=2)
    encoded = EncodedPairs.encode(chat, TASK, byte_pairs())
    assert chat.encoded == 6  # of seven contents one is empty
    grammar = AllowedTokens([range(5, 250)] * 2 + [[2]])
    results = answer_pairs(model, encoded, forced=True, constraint=grammar, max_preamble_tokens=4)
    assert chat.encoded == 6
    assert all(result.constrained.complete for result in results)


def test_constrained_answers_equal_generation_under_the_constraint(tiny_llama):
    model, chat = load(tiny_llama), Bytes(eos_id=2)
    encoded = EncodedPairs.encode(chat, TASK, byte_pairs())
    steps = [range(5, 130), range(130, 250), range(5, 250), [2]]
    results = answer_pairs(model, encoded, max_new_tokens=2, constraint=AllowedTokens(steps))
    expected = generate(model, chat, TASK, CONTENTS, max_new_tokens=8, constraint=AllowedTokens(steps))
    assert [r.constrained.text for r in results] == [e.text for e in expected]
    assert all(r.constrained.complete for r in results)  # the limit of 2 tokens applies to free answers
    assert not any(r.complete for r in results)
    assert all(math.isnan(r.constrained.nll) for r in results)


def test_a_preamble_without_a_brace_is_cut(tiny_llama, chatml_tokenizer):
    model, chat = load(tiny_llama), ChatFormat(chatml_tokenizer)
    encoded = EncodedPairs.encode(chat, RiskTask(), make_pairs())
    whole = answer_pairs(model, encoded, max_new_tokens=12)
    assert not any("{" in result.text[:4] for result in whole)
    for whole_result, result in zip(
        whole, answer_pairs(model, encoded, max_new_tokens=12, max_preamble_tokens=3), strict=True
    ):
        assert whole_result.text.startswith(result.text)
        assert len(result.text) < len(whole_result.text)
        assert not result.complete


def test_forced_severities_are_the_most_likely_ones(tiny_llama, chatml_tokenizer):
    model, chat, task = load(tiny_llama), ChatFormat(chatml_tokenizer), RiskTask()
    pairs = [*make_pairs(), Pair("risk", "{}", '{"risk_score":1}', "", "", 1)]
    encoded = EncodedPairs.encode(chat, task, pairs)
    expected = []
    for pair, prompt in zip(pairs[:3], encoded.prompts, strict=False):
        stem = pair.completion[: pair.completion.index('"severity":"') + len('"severity":"')]
        stem_ids, *choices = (chatml_tokenizer.encode(text, add_special_tokens=False) for text in (stem, *SEVERITIES))
        scores = [plain_logprob(model, prompt + stem_ids, ids) for ids in choices]
        expected.append(SEVERITIES[scores.index(max(scores))])
    assert forced_severities(model, encoded) == [*expected, ""]
    assert [r.forced for r in answer_pairs(model, encoded, max_new_tokens=1, forced=True)] == [*expected, ""]


def test_no_pairs_are_no_results():
    assert answer_pairs(torch.nn.Linear(1, 1), EncodedPairs.encode(Bytes(), TASK, [])) == []


def test_token_limit_by_hand():
    encoded = EncodedPairs.encode(Bytes(), TASK, [SimpleNamespace(content="", completion="x" * n) for n in (3, 9)])
    assert token_limit(encoded) == 10 * 3 // 2 + 16


def test_figures_by_hand():
    task, pairs = RiskTask(), make_pairs()
    outcomes = [
        PredictionResult(pairs[0].completion, nll=2.0, tokens=4, forced="low"),
        PredictionResult(pairs[1].completion.replace("high", "low"), nll=4.0, tokens=4, forced="low"),
        PredictionResult("nonsense", complete=False, nll=6.0, tokens=2, prompt_tokens_cut=5, forced=""),
    ]
    scores = score_predictions(task, pairs, outcomes, {"network"})
    figures = scores.figures
    assert figures["loss"] == 12 / 10
    assert figures["severity_accuracy"] == pytest.approx(1 / 3)
    assert figures["forced_severity_accuracy"] == 1 / 2  # of the two that were computed
    assert figures["input_determined_severity_accuracy"] == 1 / 2  # the first and third pair
    assert figures["prompts_cut"] == pytest.approx(1 / 3)
    assert figures["complete"] == pytest.approx(2 / 3)
    for name in ("loss", "forced_severity_accuracy", "input_determined_severity_accuracy"):
        low, high = scores.intervals[name]
        assert low <= figures[name] <= high
    assert list(scores.groups["category"]) == ["network", "ioc"]  # the most frequent first
    assert scores.groups["severity"]["low"]["severity_accuracy"] == 1
    assert scores.confusion[SEVERITIES.index("high")][SEVERITIES.index("low")] == 1
    assert scores.outcomes == outcomes


def test_baselines_have_no_loss_and_no_forced_choice():
    pairs = make_pairs()
    scores = score_predictions(RiskTask(), pairs, [PredictionResult(pair.completion) for pair in pairs])
    absent = {"loss", "forced_severity_accuracy", "input_determined_severity_accuracy"}
    assert not absent & (scores.figures.keys() | scores.intervals.keys())
    assert scores.figures["severity_accuracy"] == 1


def test_differences_by_hand():
    assert differences('{"a":1,"b":2}', '{"a":1,"b":3,"c":4}') == {"b": (2, 3), "c": (None, 4)}
    assert differences('{"a":1}', "nonsense") == {"a": (1, None)}
    assert differences('{"a":1}', '{"a":1}') == {}
