"""Continuous batching against one-by-one generation, and the assignment of slots with a scripted cache."""

from types import SimpleNamespace

import pytest
import torch

from lightning_modules.generation import scheduler
from lightning_modules.generation.kv_cache import SlotKVCache
from lightning_modules.generation.prefix_cache import PrefixCache
from lightning_modules.generation.requests import GenerationRequest
from lightning_modules.generation.scheduler import ProgressTracker, RunningSequence, Scheduler
from tests.helpers.byte_chat import CONTENTS, TASK, AllowedTokens, Bytes, end_that_occurs, load, one_by_one

EOS = 2


class ScriptedCache:
    """A cache whose sequences are known in advance: the next token depends on the prompt and the position only.

    Attributes:
        fills: the slots of each call of ``fill``.
        fill_steps: number of steps before each call of ``fill``.
        moves: arguments of each call of ``move``.
        steps: number of slots of each step.
    """

    def __init__(self, num_slots, lengths, device="cpu"):
        self.num_slots, self.lengths = num_slots, lengths
        self.device, self.prefix = SimpleNamespace(type=device), SimpleNamespace(ids=[1])
        self.prompts, self.fills, self.fill_steps = [None] * num_slots, [], []
        self.moves, self.steps = [], []

    def fill(self, slots, rests):
        self.fills.append(slots)
        self.fill_steps.append(len(self.steps))
        for slot, rest in zip(slots, rests, strict=True):
            self.prompts[slot] = rest

    def move(self, source, target):
        self.moves.append((source, target))
        self.prompts[target], self.prompts[source] = self.prompts[source], None

    def step(self, ids, positions, allowed):
        self.steps.append(len(ids))
        tokens = []
        for slot, position in enumerate(positions):
            prompt = self.prompts[slot]
            written = position - len(prompt) - 1 if prompt else 0  # the prefix is one token, the last one is an input
            name = prompt[0] if prompt else None
            tokens.append(EOS if name is None or written >= self.lengths[name] else 100 + written)
        return tokens, [-0.5] * len(ids)


def make_sequences(lengths, limit=50):
    """Builds one sequence per answer length; the second token of its prompt is its name, 10 + index."""
    requests = [GenerationRequest(TASK, "", limit) for _ in lengths]
    return [RunningSequence(i, request, [1, 10 + i, 3], []) for i, request in enumerate(requests)]


def run(cache, sequences, should_stop=None, progress=None):
    tracker = ProgressTracker(len(sequences), 50, progress)
    return list(Scheduler(cache, sequences, EOS, should_stop).run(tracker))


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_sequence_gets_its_own_tokens(slots, device):
    lengths = [3, 0, 7, 1, 12, 2, 5, 5, 9]
    cache = ScriptedCache(slots, {10 + i: length for i, length in enumerate(lengths)}, device)
    ended = run(cache, make_sequences(lengths))
    assert sorted(sequence.index for sequence in ended) == list(range(len(lengths)))
    for sequence in ended:
        assert sequence.tokens == [100 + i for i in range(lengths[sequence.index])]
        assert sequence.ended
        assert sequence.logprob == -0.5 * (lengths[sequence.index] + 1)


def test_a_free_slot_takes_the_next_prompt_while_others_continue():
    lengths = [1, 9, 1, 1]
    cache = ScriptedCache(2, {10 + i: length for i, length in enumerate(lengths)})
    run(cache, make_sequences(lengths))
    assert len(cache.steps) == 10  # the longest answer and its end; 4 + 10 + 2 steps one batch after another
    assert cache.fills[0] == [0, 1]
    assert all(len(slots) == 1 for slots in cache.fills[1:])


def test_the_last_sequence_moves_to_the_first_slot_when_nothing_waits():
    lengths = [1, 1, 1, 6]
    cache = ScriptedCache(4, {10 + i: length for i, length in enumerate(lengths)})
    run(cache, make_sequences(lengths))
    assert cache.moves == [(3, 0)]
    assert cache.steps == [4, 4, 1, 1, 1, 1, 1]  # three end in the second step; one row is computed after the move


def test_long_prompts_are_filled_first_and_in_batches(monkeypatch):
    monkeypatch.setattr(scheduler, "FILL_TOKENS", 12)
    requests = [GenerationRequest(TASK, "", 5) for _ in range(5)]
    sequences = [RunningSequence(i, request, [1, 10 + i, *[3] * (2 * i)], []) for i, request in enumerate(requests)]
    cache = ScriptedCache(5, dict.fromkeys(range(10, 15), 1))
    run(cache, sequences)
    assert cache.fills == [[0], [1], [2, 3], [4]]  # 9, 7, 5 + 3 and 1 tokens after the prefix, at most 12 together


@pytest.mark.parametrize(("device", "step"), [("cpu", 2), ("cuda", 3)])
def test_a_gpu_waits_for_an_eighth_of_the_slots(device, step):
    """Of 16 slots the first is free after two steps and the second after three; a seventeenth prompt waits."""
    lengths = [1, 2, *[30] * 14, 3]
    cache = ScriptedCache(16, {10 + i: length for i, length in enumerate(lengths)}, device)
    run(cache, make_sequences(lengths))
    assert cache.fills == [list(range(16)), [0]]
    assert cache.fill_steps == [0, step]


def test_limits_and_should_stop_cut():
    lengths = [20, 20, 2]
    cache = ScriptedCache(3, {10 + i: length for i, length in enumerate(lengths)})
    sequences = make_sequences(lengths, limit=6)
    ended = run(cache, sequences, should_stop=lambda tokens: len(tokens) == 4)
    assert {s.index: (len(s.tokens), s.ended) for s in ended} == {0: (4, False), 1: (4, False), 2: (2, True)}
    ended = run(ScriptedCache(3, {10: 20}), make_sequences([20], limit=6))
    assert (len(ended[0].tokens), ended[0].ended, ended[0].full) == (6, False, True)


def test_a_sequence_without_space_for_a_token_ends_at_once():
    request = GenerationRequest(TASK, "", 2)
    full = RunningSequence(0, request, [1, 10, 3, 50, 51], [50, 51])
    other = RunningSequence(1, request, [1, 11, 3], [])
    ended = run(ScriptedCache(1, {10: 9, 11: 1}), [full, other])
    assert [(s.index, s.tokens) for s in ended] == [(0, [50, 51]), (1, [100])]


def test_progress_never_decreases_and_ends_at_one():
    lengths, fractions = [3, 0, 7, 1, 12, 2], []
    cache = ScriptedCache(2, {10 + i: length for i, length in enumerate(lengths)})
    run(cache, make_sequences(lengths), progress=fractions.append)
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < 0.5
    assert fractions[-1] == 1


def test_masks_of_several_constraints_are_combined():
    first, second = AllowedTokens([[5, 6]]), AllowedTokens([[6, 7]])
    rows = [
        RunningSequence(0, GenerationRequest(TASK, "", 3, first), [1], []),
        None,
        RunningSequence(1, GenerationRequest(TASK, "", 3, second), [1], []),
        RunningSequence(2, GenerationRequest(TASK, "", 3), [1], []),
    ]
    bits = scheduler._allowed(rows)
    assert bits[:, 0].tolist() == [0b1100000, -1, 0b11000000, -1]
    assert scheduler._allowed([rows[3], None]) is None


def test_a_forced_prefix_advances_the_constraint():
    constraint = AllowedTokens([[5], [6], [7]])
    sequence = RunningSequence(0, GenerationRequest(TASK, "", 3, constraint, [5, 6]), [1, 3, 5, 6], [5, 6])
    assert constraint.seen == [[5, 6]]
    assert (sequence.newest, sequence.position) == (6, 3)


@pytest.mark.parametrize("slots", [1, 3, 7])
def test_continuous_batching_equals_one_by_one(tiny_mistral, slots):
    """The real cache: seven prompts of different lengths, answers that end early, late or at the limit."""
    model = load(tiny_mistral)
    chat = Bytes(eos_id=end_that_occurs(model, 12))
    expected = list(one_by_one(model, chat, CONTENTS, 12))
    prompts = chat.prompt_ids(TASK, CONTENTS)
    sequences = [RunningSequence(i, GenerationRequest(TASK, "", 12), ids, []) for i, ids in enumerate(prompts)]
    with torch.no_grad():
        cache = SlotKVCache(PrefixCache(model, chat.prefix_ids(TASK)), slots, max(map(len, prompts)) + 12)
        ended = list(Scheduler(cache, sequences, chat.eos_id, None).run(ProgressTracker(7, 12, None)))
    assert [(s.tokens, s.ended) for s in sorted(ended, key=lambda s: s.index)] == expected
