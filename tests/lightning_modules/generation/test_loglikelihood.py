"""Likelihoods of given answers against a plain forward pass."""

from types import SimpleNamespace

import pytest

from lightning_modules.generation.loglikelihood import completion_nll, forced_choice
from tests.helpers.byte_chat import CONTENTS, TASK, Bytes, load, plain_logprob


def test_completion_nll_equals_a_plain_forward_pass(tiny_mistral):
    model, chat = load(tiny_mistral, adapter=True), Bytes()
    pairs = [SimpleNamespace(content=c, completion=f'{{"n":{len(c)}}}' + "z" * (i % 3)) for i, c in enumerate(CONTENTS)]
    nll, tokens = completion_nll(model, chat, TASK, pairs, batch_size=3)
    for i, example in enumerate(chat.encode(TASK, pairs)):
        expected = -plain_logprob(model, example.prompt_ids.tolist(), example.completion_ids.tolist())
        assert nll[i].item() == pytest.approx(expected, rel=1e-5)
        assert tokens[i] == len(example.completion_ids)


def test_forced_choice_equals_a_plain_forward_pass(tiny_llama):
    model, chat, stem, choices = load(tiny_llama), Bytes(), '{"tags":[],"severity":"', ["info", "low", "lot"]
    stems = [stem[: 3 * i] for i in range(len(CONTENTS))]
    scores = forced_choice(model, chat, TASK, CONTENTS, stems, choices, batch_size=5)
    assert scores.shape == (len(CONTENTS), len(choices))
    for row, stem, prompt in zip(scores, stems, chat.prompt_ids(TASK, CONTENTS), strict=True):
        expected = [plain_logprob(model, prompt + chat.ids(stem), chat.ids(choice)) for choice in choices]
        assert row.tolist() == pytest.approx(expected, rel=1e-5)
