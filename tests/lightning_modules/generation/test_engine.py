"""Batched generation against model.generate, one prompt at a time."""

import pytest
import torch

from datamodules.errors import UserError
from datamodules.tasks import RiskTask
from datamodules.tokenization.chat_format import ChatFormat
from lightning_modules.generation.engine import constrain_outputs, generate, generate_requests
from lightning_modules.generation.requests import GenerationOutput, GenerationRequest
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


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
def test_equals_generating_one_by_one(request, family, adapter):
    model = load(request.getfixturevalue(family), adapter)
    chat = Bytes(eos_id=end_that_occurs(model, 12))
    expected = list(one_by_one(model, chat, CONTENTS, 12))
    assert {stopped for _, stopped in expected} == {True, False}  # both ways to end occur
    for size in (1, 3, 16):
        answers = generate(model, chat, TASK, CONTENTS, max_new_tokens=12, batch_size=size)
        assert [(answer.token_ids, answer.stopped) for answer in answers] == expected
        assert [answer.text for answer in answers] == [chat.decode(tokens) for tokens, _ in expected]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prefix", ["", "Assess this.\n"])
def test_padding_changes_nothing_with_any_prefix_and_attention(tiny_llama, prefix, attention):
    model, chat = load(tiny_llama), Bytes(prefix)
    model.set_attn_implementation(attention)
    expected = [tokens for tokens, _ in one_by_one(model, chat, CONTENTS, 6)]
    answers = generate(model, chat, TASK, CONTENTS, max_new_tokens=6, batch_size=4)
    assert [answer.token_ids for answer in answers] == expected


def test_logprob_is_the_probability_of_the_answer(tiny_llama):
    model = load(tiny_llama)
    chat = Bytes(eos_id=end_that_occurs(model, 9))
    for content, answer in zip(CONTENTS, generate(model, chat, TASK, CONTENTS, max_new_tokens=9), strict=True):
        tokens = answer.token_ids + [chat.eos_id] * answer.stopped
        (prompt,) = chat.prompt_ids(TASK, [content])
        assert answer.logprob == pytest.approx(plain_logprob(model, prompt, tokens), abs=1e-4)


def test_bfloat16_equals_one_by_one_in_the_first_token(tiny_llama):
    """In half precision sums depend on the batch, so that later tokens may differ."""
    model, chat = load(tiny_llama).to(torch.bfloat16), Bytes()
    expected = [tokens for tokens, _ in one_by_one(model, chat, CONTENTS, 1)]
    answers = generate(model, chat, TASK, CONTENTS, max_new_tokens=1, batch_size=4)
    assert [answer.token_ids for answer in answers] == expected


def test_adapter_in_float32_on_a_base_in_half_precision(tiny_llama):
    """As the backbone builds it: the products have the base's dtype, and the probabilities are finite."""
    model, chat = load(tiny_llama, adapter=True), Bytes()
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = [tokens for tokens, _ in one_by_one(model, chat, CONTENTS, 1)]
    answers = generate(model, chat, TASK, CONTENTS, max_new_tokens=1, batch_size=1)
    assert [answer.token_ids for answer in answers] == expected
    assert all(answer.logprob < 0 for answer in answers)


def test_flex_attention_is_replaced_by_sdpa_and_restored(tiny_llama):
    model, chat = load(tiny_llama, adapter=True), Bytes()
    expected = generate(model, chat, TASK, CONTENTS, max_new_tokens=5)
    model.get_base_model().set_attn_implementation("flex_attention")
    assert generate(model, chat, TASK, CONTENTS, max_new_tokens=5) == expected
    assert model.config._attn_implementation == "flex_attention"


def test_gradient_checkpointing_changes_nothing(tiny_llama):
    model, chat = load(tiny_llama, adapter=True), Bytes()
    expected = generate(model, chat, TASK, CONTENTS, max_new_tokens=5)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert generate(model.train(), chat, TASK, CONTENTS, max_new_tokens=5) == expected


@pytest.mark.parametrize("forced_prefix", [[], [11]], ids=["from the start", "forced_prefix"])
def test_constraint_restricts_every_step_and_ends_the_answer(tiny_llama, forced_prefix):
    model, chat = load(tiny_llama), Bytes()
    constraint = AllowedTokens([[10, 11], [20, 31, 63], [chat.eos_id]])
    answers = generate(
        model,
        chat,
        TASK,
        CONTENTS,
        max_new_tokens=9,
        batch_size=3,
        constraint=constraint,
        forced_prefix=[forced_prefix] * len(CONTENTS),
    )
    for answer in answers:
        assert answer.stopped
        assert answer.token_ids[: len(forced_prefix)] == forced_prefix
        assert [token in ids for token, ids in zip(answer.token_ids, constraint.steps, strict=False)] == [True, True]
    assert sorted(constraint.seen) == sorted(answer.token_ids for answer in answers)


def test_a_forced_prefix_is_continued_as_if_it_had_been_generated(tiny_llama):
    model, chat = load(tiny_llama), Bytes(eos_id=999)
    whole = generate(model, chat, TASK, CONTENTS, max_new_tokens=12)
    forced_prefix = [answer.token_ids[: 2 * i] for i, answer in enumerate(whole)]
    again = generate(model, chat, TASK, CONTENTS, max_new_tokens=12, batch_size=3, forced_prefix=forced_prefix)
    assert [a.token_ids for a in again] == [a.token_ids for a in whole]


def test_should_stop_cuts_an_answer_as_the_token_limit_does(tiny_llama):
    model, chat = load(tiny_llama), Bytes(eos_id=999)
    whole = generate(model, chat, TASK, CONTENTS, max_new_tokens=6)
    reported = []
    answers = generate(
        model, chat, TASK, CONTENTS, max_new_tokens=6, batch_size=2,
        should_stop=lambda tokens: len(tokens) == 4, on_answer=lambda index, answer: reported.append((index,
        answer)),
    )  # fmt: skip
    assert [a.token_ids for a in answers] == [a.token_ids[:4] for a in whole]
    assert not any(a.stopped for a in answers)
    assert [answer for _, answer in sorted(reported)] == answers


def test_fewer_slots_are_used_if_the_cache_does_not_fit(tiny_llama, monkeypatch):
    model, chat = load(tiny_llama), Bytes()
    expected = generate(model, chat, TASK, CONTENTS, max_new_tokens=5)
    monkeypatch.setattr("lightning_modules.generation.engine.free_memory", lambda device: 1)
    assert [a.token_ids for a in generate(model, chat, TASK, CONTENTS, max_new_tokens=5)] == [
        a.token_ids for a in expected
    ]


def test_modes_random_state_and_progress(tiny_llama):
    model, chat, shares = load(tiny_llama, adapter=True).train(), Bytes(), []
    model.base_model.model.lm_head.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first = generate(model, chat, TASK, CONTENTS, max_new_tokens=5, batch_size=3, progress=shares.append)
    second = generate(model, chat, TASK, CONTENTS, max_new_tokens=5, batch_size=7)
    assert [a.token_ids for a in first] == [a.token_ids for a in second]  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_a_long_prompt_is_cut_and_the_cut_tokens_are_counted(tiny_llama, chatml_tokenizer):
    model, chat, task = load(tiny_llama), ChatFormat(chatml_tokenizer), RiskTask()
    limit = len(chat.prefix_ids(task)) + 90
    model.config.max_position_embeddings = limit + 9
    contents = ['{"title":"a"}', '{"title":"' + "b" * 300 + '","end":1}']
    short, long = generate(model, chat, task, contents, max_new_tokens=9)
    ids, cut = chat.truncate_prompt(task, contents[1], limit)
    assert (short.prompt_tokens_cut, long.prompt_tokens_cut) == (0, cut)
    assert cut > 200
    with torch.no_grad():
        new = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=chat.eos_id)
    assert long.token_ids == [token for token in new[0, len(ids) :].tolist() if token != chat.eos_id]


def test_a_prompt_without_space_for_an_answer_is_an_error(tiny_llama):
    model = load(tiny_llama)
    model.config.max_position_embeddings = 30
    with pytest.raises(UserError, match=r"prompt of .* tokens leaves no room .* max_new_tokens"):
        generate(model, Bytes(), TASK, CONTENTS, max_new_tokens=9)


def test_no_contents():
    assert generate(torch.nn.Linear(1, 1), Bytes(), TASK, []) == []


def test_encoded_prompts_are_not_encoded_again(tiny_llama):
    model, chat = load(tiny_llama), Bytes()
    expected = generate(model, chat, TASK, CONTENTS, max_new_tokens=5)
    prompts = chat.prompt_ids(TASK, CONTENTS)
    requests = [GenerationRequest(TASK, c, 5, prompt_ids=ids) for c, ids in zip(CONTENTS, prompts, strict=True)]
    chat.encoded = 0
    assert generate_requests(model, chat, requests) == expected
    assert chat.encoded == 0
    requests[2:5] = [GenerationRequest(TASK, content, 5) for content in CONTENTS[2:5]]
    assert generate_requests(model, chat, requests) == expected
    assert chat.encoded == 2  # the third content is empty


def test_requests_of_different_limits_and_tasks_equal_their_own_runs(tiny_llama):
    model, chat = load(tiny_llama), Bytes(eos_id=999)
    limits = [1 + 3 * i for i in range(len(CONTENTS))]
    requests = [GenerationRequest(TASK, c, limit) for c, limit in zip(CONTENTS, limits, strict=True)]
    outputs = generate_requests(model, chat, requests, batch_size=3)
    for content, limit, output in zip(CONTENTS, limits, outputs, strict=True):
        assert [(output.token_ids, output.stopped)] == list(one_by_one(model, chat, [content], limit))


def test_only_outputs_that_violate_the_constraint_are_generated_again():
    constraint = AllowedTokens([[5, 6], [7], [2]])
    free = [
        GenerationOutput("valid", True, [5, 7], -1.0),
        GenerationOutput("invalid at the second token", True, [6, 8], -1.0),
        GenerationOutput("cut", False, [6, 7], -1.0),
    ]
    calls = []

    def generate_from(indices, prefixes):
        calls.append((indices, prefixes))
        return [GenerationOutput("again", True, [*prefix, 9], -2.0) for prefix in prefixes]

    outputs = constrain_outputs(free, constraint, 2, generate_from)
    assert calls == [([1, 2], [[6], [6, 7]])]
    assert [output.text for output in outputs] == ["valid", "again", "again"]
    assert constrain_outputs(free[:1], constraint, 2, generate_from) == free[:1]
    assert len(calls) == 1  # nothing to generate
