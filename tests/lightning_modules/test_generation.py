"""Batched generation against model.generate one by one, and likelihoods against a plain forward pass."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from datamodules.errors import UserError
from lightning_modules.generation import completion_nll, forced_choice, generate

CONTENTS = ["a", "an open port 4444", "x" * 41, "suid binary", "", "world writable /tmp/x", "cron"]
TASK = SimpleNamespace(name="risk")


class Bytes:
    """A chat format of bytes: ids 5 + byte, BOS 1, prompts that begin with the same instruction."""

    pad_id, bos_id = 0, 1

    def __init__(self, prefix="Assess this.\n", eos_id=2):
        self.prefix, self.eos_id = prefix, eos_id

    def ids(self, text):
        return [5 + byte % 250 for byte in text.encode()]

    def prefix_ids(self, task):
        return [1, *self.ids(self.prefix)] if self.prefix else []

    def prompt_ids(self, task, contents):
        return [[*self.prefix_ids(task), *self.ids(content), 4] for content in contents]

    def encode(self, task, pairs):
        prompts = self.prompt_ids(task, [pair.content for pair in pairs])
        return [
            SimpleNamespace(
                prompt_ids=np.array(prompt, np.int32), completion_ids=np.array([*self.ids(p.completion), self.eos_id])
            )
            for prompt, p in zip(prompts, pairs, strict=True)
        ]

    def decode(self, ids):
        return " ".join(map(str, ids))


def load(folder, adapter=False):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if not adapter:
        return model
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def one_by_one(model, chat, contents, limit):
    """Tokens of model.generate for each prompt alone, and whether they ended."""
    for prompt in chat.prompt_ids(TASK, contents):
        ids = torch.tensor([prompt])
        new = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False,
            eos_token_id=chat.eos_id, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        stopped = new[-1] == chat.eos_id
        yield (new[:-1] if stopped else new), stopped


def end_that_occurs(model, limit):
    """An id that the random model writes in some answers early, in some late and in some never."""
    written = [tokens for tokens, _ in one_by_one(model, Bytes(eos_id=2), CONTENTS, limit)]
    ids = {token for tokens in written for token in tokens}
    return min(ids, key=lambda token: (abs(sum(token in tokens for tokens in written) - len(written) // 2), token))


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
def test_equals_generating_one_by_one(request, family, adapter):
    model = load(request.getfixturevalue(family), adapter)
    chat = Bytes(eos_id=end_that_occurs(model, 12))
    expected = list(one_by_one(model, chat, CONTENTS, 12))
    assert {stopped for _, stopped in expected} == {True, False}  # both ways to end are met
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


def plain_logprob(model, prompt, completion):
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))


def test_logprob_is_the_probability_of_the_answer(tiny_llama):
    model = load(tiny_llama)
    chat = Bytes(eos_id=end_that_occurs(model, 9))
    for content, answer in zip(CONTENTS, generate(model, chat, TASK, CONTENTS, max_new_tokens=9), strict=True):
        tokens = answer.token_ids + [chat.eos_id] * answer.stopped
        (prompt,) = chat.prompt_ids(TASK, [content])
        assert answer.logprob == pytest.approx(plain_logprob(model, prompt, tokens), abs=1e-4)


def test_completion_nll_equals_a_plain_forward_pass(tiny_mistral):
    model, chat = load(tiny_mistral, adapter=True), Bytes()
    pairs = [SimpleNamespace(content=c, completion=f'{{"n":{len(c)}}}' + "z" * (i % 3)) for i, c in enumerate(CONTENTS)]
    nll, tokens = completion_nll(model, chat, TASK, pairs, batch_size=3)
    for i, example in enumerate(chat.encode(TASK, pairs)):
        expected = -plain_logprob(model, example.prompt_ids.tolist(), example.completion_ids.tolist())
        assert nll[i].item() == pytest.approx(expected, rel=1e-5)
        assert tokens[i] == len(example.completion_ids)


def test_forced_choice_equals_a_plain_forward_pass(tiny_llama):
    model, chat, stem, choices = load(tiny_llama), Bytes(), '{"severity":"', ["info", "low", "lot"]
    scores = forced_choice(model, chat, TASK, CONTENTS, stem, choices, batch_size=5)
    assert scores.shape == (len(CONTENTS), len(choices))
    for row, prompt in zip(scores, chat.prompt_ids(TASK, CONTENTS), strict=True):
        expected = [plain_logprob(model, prompt + chat.ids(stem), chat.ids(choice)) for choice in choices]
        assert row.tolist() == pytest.approx(expected, rel=1e-5)


def test_bfloat16_answers_like_itself_alone(tiny_llama):
    """In half precision sums depend on the batch; each row's first token still is its own."""
    model, chat = load(tiny_llama).to(torch.bfloat16), Bytes()
    expected = [tokens for tokens, _ in one_by_one(model, chat, CONTENTS, 1)]
    answers = generate(model, chat, TASK, CONTENTS, max_new_tokens=1, batch_size=4)
    assert [answer.token_ids for answer in answers] == expected


def test_adapter_in_float32_on_a_base_in_half_precision(tiny_llama):
    """As the backbone builds it; the products run in the base's type, and the probabilities are finite."""
    model, chat = load(tiny_llama, adapter=True), Bytes()
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = [tokens for tokens, _ in one_by_one(model, chat, CONTENTS, 1)]
    answers = generate(model, chat, TASK, CONTENTS, max_new_tokens=1, batch_size=1)
    assert [answer.token_ids for answer in answers] == expected
    assert all(answer.logprob < 0 for answer in answers)


def test_flex_attention_gives_way_to_sdpa_and_comes_back(tiny_llama):
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


def test_constraint_restricts_every_step_and_ends_the_answer(tiny_llama):
    model, chat = load(tiny_llama), Bytes()
    allowed = [[10, 11], [20, 21, 22], [chat.eos_id]]
    seen = []

    def constraint():
        steps, tokens = iter(allowed), []
        seen.append(tokens)

        def matcher(token):
            tokens.append(token)
            return torch.zeros(250, dtype=torch.bool).index_fill(0, torch.tensor(next(steps)), True)

        return matcher

    answers = generate(model, chat, TASK, CONTENTS, max_new_tokens=9, batch_size=3, constraint=constraint)
    for answer in answers:
        assert answer.stopped
        assert [token in ids for token, ids in zip(answer.token_ids, allowed, strict=False)] == [True, True]
    assert sorted(seen, key=str) == sorted([[None, *answer.token_ids] for answer in answers], key=str)


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


def test_prompt_beyond_the_models_positions_is_refused(tiny_llama):
    model = load(tiny_llama)
    model.config.max_position_embeddings = 64
    with pytest.raises(UserError, match=r"prompt of 56 tokens .* max_new_tokens"):
        generate(model, Bytes(), TASK, CONTENTS, max_new_tokens=9)


def test_no_contents():
    assert generate(torch.nn.Linear(1, 1), Bytes(), TASK, []) == []
