"""Likelihoods of given answers against a plain forward pass."""

from types import SimpleNamespace

import pytest

from lightning_modules.generation.encoded_pairs import EncodedPairs
from lightning_modules.generation.loglikelihood import completion_nll, forced_choice
from tests.helpers.byte_chat import CONTENTS, TASK, Bytes, load, plain_logprob


def encode(chat, pairs=None):
    """Encodes pairs, or the contents with an empty completion."""
    pairs = pairs or [SimpleNamespace(content=content, completion="") for content in CONTENTS]
    return EncodedPairs.encode(chat, TASK, pairs)


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_completion_nll_equals_a_plain_forward_pass(tiny_mistral, batch_size):
    model, chat = load(tiny_mistral, adapter=True), Bytes()
    pairs = [SimpleNamespace(content=c, completion=f'{{"n":{len(c)}}}' + "z" * (i % 3)) for i, c in enumerate(CONTENTS)]
    fractions = []
    nll, tokens = completion_nll(model, encode(chat, pairs), batch_size=batch_size, progress=fractions.append)
    for i, example in enumerate(chat.encode(TASK, pairs)):
        expected = -plain_logprob(model, example.prompt_ids.tolist(), example.completion_ids.tolist())
        assert nll[i].item() == pytest.approx(expected, rel=1e-5)
        assert tokens[i] == len(example.completion_ids)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


@pytest.mark.parametrize("choices", [["info", "low", "lot"], ["a", "b"]], ids=["several tokens", "one token"])
def test_forced_choice_equals_a_plain_forward_pass(tiny_llama, choices):
    model, chat, stem = load(tiny_llama), Bytes(), '{"tags":[],"severity":"'
    stems = [stem[: 3 * i] for i in range(len(CONTENTS))]
    scores = forced_choice(model, encode(chat), stems, choices, batch_size=5)
    assert scores.shape == (len(CONTENTS), len(choices))
    for row, stem, prompt in zip(scores, stems, chat.prompt_ids(TASK, CONTENTS), strict=True):
        expected = [plain_logprob(model, prompt + chat.ids(stem), chat.ids(choice)) for choice in choices]
        assert row.tolist() == pytest.approx(expected, rel=1e-5)


def test_encoded_prompts_are_not_encoded_again(tiny_llama):
    model, chat = load(tiny_llama), Bytes()
    encoded = encode(chat)
    chat.encoded = 0
    completion_nll(model, encoded)
    forced_choice(model, encoded, [""] * len(CONTENTS), ["ab", "cd"])
    assert chat.encoded == 0
