"""Batched generation against model.generate one by one, and likelihoods against a plain forward pass."""

from types import SimpleNamespace

import pytest
import torch

from datamodules.errors import UserError
from datamodules.tasks import RiskTask
from datamodules.tokenization.chat_format import ChatFormat
from lightning_modules.generation import kv_cache
from lightning_modules.generation.engine import generate
from lightning_modules.generation.merged_weights import merged
from lightning_modules.models.backbone import Backbone, LoRA
from tests.helpers.byte_chat import CONTENTS, TASK, Bytes, load, plain_logprob


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


def test_logprob_is_the_probability_of_the_answer(tiny_llama):
    model = load(tiny_llama)
    chat = Bytes(eos_id=end_that_occurs(model, 9))
    for content, answer in zip(CONTENTS, generate(model, chat, TASK, CONTENTS, max_new_tokens=9), strict=True):
        tokens = answer.token_ids + [chat.eos_id] * answer.stopped
        (prompt,) = chat.prompt_ids(TASK, [content])
        assert answer.logprob == pytest.approx(plain_logprob(model, prompt, tokens), abs=1e-4)


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


class Script:
    """A constraint that allows some tokens at each step, whatever came before."""

    def __init__(self, allowed):
        self.steps, self.seen = allowed, []

    def start(self):
        matcher = SimpleNamespace(tokens=[])
        matcher.accept = matcher.tokens.append
        self.seen.append(matcher.tokens)
        return matcher

    def allowed(self, matchers):
        bits = torch.zeros(len(matchers), 8, dtype=torch.int64)
        for row, matcher in enumerate(matchers):
            for token in self.steps[len(matcher.tokens)]:
                bits[row, token // 32] |= 1 << token % 32
        return bits.to(torch.int32)


@pytest.mark.parametrize("forced_prefix", [[], [11]], ids=["from the start", "forced_prefix"])
def test_constraint_restricts_every_step_and_ends_the_answer(tiny_llama, forced_prefix):
    model, chat = load(tiny_llama), Bytes()
    script = Script([[10, 11], [20, 31, 63], [chat.eos_id]])
    answers = generate(
        model,
        chat,
        TASK,
        CONTENTS,
        max_new_tokens=9,
        batch_size=3,
        constraint=script,
        forced_prefix=[forced_prefix] * len(CONTENTS),
    )
    for answer in answers:
        assert answer.stopped
        assert answer.token_ids[: len(forced_prefix)] == forced_prefix
        assert [token in ids for token, ids in zip(answer.token_ids, script.steps, strict=False)] == [True, True]
    assert sorted(script.seen) == sorted(answer.token_ids for answer in answers)


def test_begun_answers_go_on_as_if_they_had_been_generated(tiny_llama):
    model, chat = load(tiny_llama), Bytes(eos_id=999)
    whole = generate(model, chat, TASK, CONTENTS, max_new_tokens=12)
    forced_prefix = [answer.token_ids[: 2 * i] for i, answer in enumerate(whole)]
    again = generate(model, chat, TASK, CONTENTS, max_new_tokens=12, batch_size=3, forced_prefix=forced_prefix)
    assert [a.token_ids for a in again] == [a.token_ids for a in whole]


def test_giving_up_cuts_an_answer_as_the_limit_does(tiny_llama):
    model, chat = load(tiny_llama), Bytes(eos_id=999)
    whole = generate(model, chat, TASK, CONTENTS, max_new_tokens=6)
    given_up = []
    answers = generate(
        model, chat, TASK, CONTENTS, max_new_tokens=6, batch_size=2,
        max_preamble_tokens=lambda tokens: len(tokens) == 4, on_answer=lambda index, answer: given_up.append((index,
        answer)),
    )  # fmt: skip
    assert [a.token_ids for a in answers] == [a.token_ids[:4] for a in whole]
    assert not any(a.stopped for a in answers)
    assert [answer for _, answer in sorted(given_up)] == answers


def test_merged_copies_answer_like_the_layers_and_are_gone_afterwards(tiny_llama):
    model, chat = load(tiny_llama, adapter=True), Bytes()
    modules, state = list(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    expected = list(one_by_one(model, chat, CONTENTS, 9))
    with merged(model) as there:
        assert there
        assert not any("lora" in name for name, _ in model.named_parameters())
        assert list(one_by_one(model, chat, CONTENTS, 9)) == expected
    assert list(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_merged_where_memory_is_short_or_the_adapter_is_not_a_sum(tiny_llama, monkeypatch):
    with merged(load(tiny_llama)) as there:
        assert not there  # no adapter
    model = load(tiny_llama, adapter=True)
    with model.disable_adapter(), merged(model) as there:
        assert not there
    monkeypatch.setattr("lightning_modules.generation.merged_weights.free_memory", lambda device: 1000)
    with merged(model) as there:
        assert not there


def test_merged_4bit_layers_are_dequantised_once_with_the_adapter_added(tiny_llama):
    functional = pytest.importorskip("bitsandbytes").functional
    model = Backbone(str(tiny_llama), "nf4", "float32", lora=LoRA(rank=4, alpha=12)).build()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    weight = functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    expected = weight + 12 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with torch.no_grad(), merged(model.eval()) as there:
        assert there
        copy = model.get_base_model().model.layers[1].mlp.down_proj
        torch.testing.assert_close(copy.weight, expected)
        first = model(torch.arange(20)[None]).logits
    assert model.get_base_model().model.layers[1].mlp.down_proj is layer
    with torch.no_grad():  # bitsandbytes computes in bfloat16 here, and packs the weights for it
        torch.testing.assert_close(model(torch.arange(20)[None]).logits, first, rtol=0.1, atol=0.3)
    packed = getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
    with merged(model) as there:
        assert there is not packed  # what is packed can't be dequantised any more


@pytest.mark.parametrize("fewest", [1, 3])
def test_steps_of_a_gpus_shapes_write_the_same(tiny_llama, monkeypatch, fewest):
    """Slots in halves and positions in multiples, as graphs want them, without the graphs."""
    model, shapes = load(tiny_llama), set()
    chat = Bytes(eos_id=end_that_occurs(model, 12))
    expected = list(one_by_one(model, chat, CONTENTS, 12))
    whole = kv_cache.SlotKVCache.__init__

    def with_shapes(self, *arguments):
        def compute(rows, seen):
            shapes.add((rows.shape[1], seen))
            return self._next(rows, seen)

        whole(self, *arguments)
        self._graphs = compute

    monkeypatch.setattr(kv_cache.SlotKVCache, "__init__", with_shapes)
    monkeypatch.setattr(kv_cache, "PLACES", 16)
    monkeypatch.setattr(kv_cache, "FEWEST", fewest)
    answers = generate(model, chat, TASK, CONTENTS, max_new_tokens=12, batch_size=5)
    assert [(answer.token_ids, answer.stopped) for answer in answers] == expected
    longest = max(map(len, chat.prompt_ids(TASK, CONTENTS))) + 12
    assert {count for count, _ in shapes} <= ({5, 3, 2, 1} if fewest == 1 else {5, 3})
    assert {seen for _, seen in shapes} <= {16, 32, 48, 64, longest}


@pytest.mark.gpu
@pytest.mark.parametrize("held", [False, True], ids=["free", "constrained"])
def test_graphs_write_what_single_steps_write(tiny_llama, monkeypatch, held):
    model, chat = load(tiny_llama, adapter=True).cuda(), Bytes(eos_id=999)
    constraint = Script([range(5, 250)] * 24) if held else None
    with_graphs = generate(model, chat, TASK, CONTENTS, max_new_tokens=24, batch_size=4, constraint=constraint)
    monkeypatch.setattr(kv_cache, "EAGER", 1 << 30)
    without = generate(model, chat, TASK, CONTENTS, max_new_tokens=24, batch_size=4, constraint=constraint)
    assert [answer.token_ids for answer in with_graphs] == [answer.token_ids for answer in without]


def test_slots_are_fewer_where_the_cache_would_not_fit(tiny_llama, monkeypatch):
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


def test_long_prompt_is_cut_by_rule_and_says_so(tiny_llama, chatml_tokenizer):
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


def test_no_room_for_an_answer_is_refused(tiny_llama):
    model = load(tiny_llama)
    model.config.max_position_embeddings = 30
    with pytest.raises(UserError, match=r"prompt of .* tokens leaves no room .* max_new_tokens"):
        generate(model, Bytes(), TASK, CONTENTS, max_new_tokens=9)


def test_no_contents():
    assert generate(torch.nn.Linear(1, 1), Bytes(), TASK, []) == []
