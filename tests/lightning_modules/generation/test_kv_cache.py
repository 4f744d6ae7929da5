"""The slot cache against a plain concatenated cache, and its steps against a forward pass without a cache."""

import pytest
import torch
from transformers.cache_utils import Cache

from lightning_modules.generation import kv_cache
from lightning_modules.generation.engine import generate
from lightning_modules.generation.kv_cache import CacheIndex, SlotKVCache, unpack_bits
from lightning_modules.generation.prefix_cache import PrefixCache
from tests.helpers.byte_chat import CONTENTS, TASK, AllowedTokens, Bytes, end_that_occurs, load, one_by_one

PREFIX = [1, 20, 21, 22]
PROMPTS = [[*PREFIX, 30, 31, 32, 33, 34], [*PREFIX, 40], [*PREFIX, 50, 51]]


def make_cache(model, slots=4, length=24, prefix=PREFIX):
    with torch.no_grad():
        return SlotKVCache(PrefixCache(model, list(prefix)), slots, length)


def plain_states(model, ids):
    """Returns keys and values [layer][2] of a sequence from transformers' own cache, which concatenates."""
    with torch.no_grad():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def slot_states(cache, slot, length):
    return [(layer.keys[slot, :, :length], layer.values[slot, :, :length]) for layer in cache._layers]


def plain_step(model, ids):
    """Returns the most likely next token and its log-probability, without a cache."""
    with torch.no_grad():
        logprob, token = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1).max(-1)
    return token.item(), logprob.item()


@pytest.mark.parametrize("prefix", [PREFIX, []], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("slots", [[0, 1, 2], [3, 0, 2]])
def test_filled_slots_hold_the_keys_and_values_of_a_plain_cache(tiny_mistral, slots, prefix):
    model = load(tiny_mistral)
    cache = make_cache(model, prefix=prefix)
    with torch.no_grad():
        cache.fill(slots, [prompt[len(prefix) :] for prompt in PROMPTS])
    for slot, prompt in zip(slots, PROMPTS, strict=True):
        torch.testing.assert_close(slot_states(cache, slot, len(prompt)), plain_states(model, prompt))


def test_a_forward_pass_writes_at_its_index_and_nowhere_else(tiny_llama):
    """Slots and positions differ per row, and the rest of the cache stays bit for bit."""
    cache = make_cache(load(tiny_llama))
    layer = cache._layers[1]
    before = layer.keys.clone()
    index = CacheIndex(torch.tensor([2, 0]), torch.tensor([[7, 8, 9], [4, 5, 11]]), torch.tensor([2, 0]), 12)
    new = torch.randn(2, layer.keys.shape[1], 3, layer.keys.shape[3])
    keys, values = kv_cache._IndexedLayer(layer, index).update(new, -new)
    expected = before.clone()
    for row, slot in enumerate((2, 0)):
        for i in range(3):
            expected[slot, :, index.positions_BS[row, i]] = new[row, :, i]
    assert torch.equal(layer.keys, expected)
    assert torch.equal(keys, expected[[2, 0], :, :12])
    assert torch.equal(values[0, :, 7:10], -new[0])


def test_two_passes_of_different_indices_do_not_share_state(tiny_llama):
    """Two caches are built before either is used; each writes at the index that it was given."""
    cache = make_cache(load(tiny_llama))
    layer = cache._layers[0]
    indices = [CacheIndex(torch.tensor([i]), torch.tensor([[6 + i]]), slice(i, i + 1), 8) for i in range(2)]
    views = [Cache(layers=[kv_cache._IndexedLayer(layer, index)]) for index in indices]
    new = [torch.full((1, layer.keys.shape[1], 1, layer.keys.shape[3]), float(i + 1)) for i in range(2)]
    for i in (1, 0):
        views[i].update(new[i], new[i], 0)
    for i in range(2):
        assert torch.equal(layer.keys[i, :, 6 + i], new[i][0, :, 0])
        assert not layer.keys[i, :, 7 - i].any()


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
def test_steps_equal_a_forward_pass_over_the_whole_sequence(request, family):
    """Three slots of different lengths, one of them free in between and then taken by another prompt."""
    model = load(request.getfixturevalue(family))
    cache, sequences = make_cache(model), [list(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        cache.fill([0, 1, 2], [prompt[len(PREFIX) : -1] for prompt in PROMPTS])
        for number in range(6):
            if number == 3:  # the second slot takes another prompt, shorter than its sequence so far
                sequences[1] = [*PREFIX, 60, 61]
                cache.fill([1], [sequences[1][len(PREFIX) : -1]])
            ids, positions = [s[-1] for s in sequences], [len(s) - 1 for s in sequences]
            tokens, logprobs = cache.step(ids, positions, lambda: None)
            for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
                expected, expected_logprob = plain_step(model, sequence)
                assert token == expected
                assert logprob == pytest.approx(expected_logprob, abs=1e-4)
                sequence.append(token)


def test_a_free_slot_does_not_change_its_neighbours(tiny_llama):
    model = load(tiny_llama)
    cache = make_cache(model)
    with torch.no_grad():
        cache.fill([0, 2], [PROMPTS[0][4:-1], PROMPTS[2][4:-1]])
        ids, positions = [PROMPTS[0][-1], 0, PROMPTS[2][-1]], [len(PROMPTS[0]) - 1, 4, len(PROMPTS[2]) - 1]
        tokens, _ = cache.step(ids, positions, lambda: None)
    assert (tokens[0], tokens[2]) == (plain_step(model, PROMPTS[0])[0], plain_step(model, PROMPTS[2])[0])


def test_a_moved_slot_continues_in_its_new_place(tiny_llama):
    model = load(tiny_llama)
    cache, prompt = make_cache(model), PROMPTS[0]
    with torch.no_grad():
        cache.fill([3], [prompt[len(PREFIX) : -1]])
        cache.move(3, 0)
        tokens, _ = cache.step([prompt[-1]], [len(prompt) - 1], lambda: None)
    assert tokens == [plain_step(model, prompt)[0]]


def test_only_allowed_tokens_are_chosen(tiny_llama):
    model = load(tiny_llama)
    cache, prompt = make_cache(model), PROMPTS[1]
    bits = torch.zeros(1, 9, dtype=torch.int32)
    bits[0, 3] = 0b101  # tokens 96 and 98
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
        tokens, logprobs = cache.step([prompt[-1]], [len(prompt) - 1], lambda: bits)
    choice = max((96, 98), key=lambda token: logits[token].item())
    assert tokens == [choice]
    expected = logits[[96, 98]].log_softmax(-1).max().item()  # normalised over the allowed tokens
    assert logprobs == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 64, 70])
def test_unpack_bits_by_hand(vocabulary):
    bits = torch.tensor([[-1, 0], [1 << 30, -(1 << 31)]], dtype=torch.int32)
    allowed = unpack_bits(bits, vocabulary)
    expected = torch.zeros(2, 70, dtype=torch.bool)
    expected[0, :32] = True
    expected[1, 30] = expected[1, 63] = True
    assert torch.equal(allowed, expected[:, :vocabulary])


@pytest.mark.parametrize(
    ("slots", "needed", "padded"), [(100, 100, 100), (100, 50, 50), (100, 51, 100), (100, 1, 13), (4, 1, 4)]
)
def test_padded_slots_are_halves_of_all_slots(slots, needed, padded):
    assert kv_cache._padded_slots(slots, needed) == padded


@pytest.mark.parametrize("min_slots", [1, 3])
def test_steps_of_a_gpus_shapes_generate_the_same(tiny_llama, monkeypatch, min_slots):
    """Slots are halved and positions are multiples, as for CUDA graphs, but without the graphs."""
    model, shapes = load(tiny_llama), set()
    chat = Bytes(eos_id=end_that_occurs(model, 12))
    expected = list(one_by_one(model, chat, CONTENTS, 12))
    whole = kv_cache.SlotKVCache.__init__

    def with_shapes(self, *arguments):
        def compute(rows, length):
            shapes.add((rows.shape[1], length))
            return self._step_logits(rows, length)

        whole(self, *arguments)
        self._graphs = compute

    monkeypatch.setattr(kv_cache.SlotKVCache, "__init__", with_shapes)
    monkeypatch.setattr(kv_cache, "POSITIONS_MULTIPLE", 16)
    monkeypatch.setattr(kv_cache, "MIN_SLOTS", min_slots)
    answers = generate(model, chat, TASK, CONTENTS, max_new_tokens=12, batch_size=5)
    assert [(answer.token_ids, answer.stopped) for answer in answers] == expected
    longest = max(map(len, chat.prompt_ids(TASK, CONTENTS))) + 12
    assert {count for count, _ in shapes} <= ({5, 3, 2, 1} if min_slots == 1 else {5, 3})
    assert {length for _, length in shapes} <= {16, 32, 48, 64, longest}


@pytest.mark.gpu
@pytest.mark.parametrize("constrained", [False, True], ids=["free", "constrained"])
def test_graphs_generate_what_single_steps_generate(tiny_llama, monkeypatch, constrained):
    model, chat = load(tiny_llama, adapter=True).cuda(), Bytes(eos_id=999)
    constraint = AllowedTokens([range(5, 250)] * 24) if constrained else None
    with_graphs = generate(model, chat, TASK, CONTENTS, max_new_tokens=24, batch_size=4, constraint=constraint)
    monkeypatch.setattr(kv_cache, "WARMUP_STEPS", 1 << 30)
    without = generate(model, chat, TASK, CONTENTS, max_new_tokens=24, batch_size=4, constraint=constraint)
    assert [answer.token_ids for answer in with_graphs] == [answer.token_ids for answer in without]
