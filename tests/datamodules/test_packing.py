"""Rows: exact layout, properties of the packing, and the same loss and gradients in every mode."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from datamodules import FindingsDataModule
from datamodules.packing import Row, best_fit_decreasing, pack, subset_sums, to_batch
from datamodules.tasks.base import Pair
from datamodules.tokenization.chat_format import ChatFormat
from tests.helpers.findings_data import example


def lists(batch):
    return [t.tolist() for t in (batch.input_ids_BT, batch.segment_ids_BT, batch.position_ids_BT, batch.labels_BT)]


def test_layout_is_the_contract_of_batch():
    a, b = example([1, 7, 10], [11, 2], prefix=2), example([1, 7, 20], [21, 2], prefix=2)
    rows = pack([a, b], sequence_length=9, mode="shared_prefix")
    batch = to_batch(rows, 9)
    assert lists(batch) == [
        [[1, 7, 10, 11, 2, 20, 21, 2, 0]],
        [[0, 0, 1, 1, 1, 2, 2, 2, -1]],
        [[0, 1, 2, 3, 4, 2, 3, 4, 0]],
        [[-100, -100, 11, 2, -100, 21, 2, -100, -100]],
    ]
    assert (batch.findings, batch.supervised, rows[0].tokens) == (2, 4, 8)
    assert all(t.dtype == torch.int64 for t in (batch.input_ids_BT, batch.labels_BT, batch.segment_ids_BT))


def test_packed_restarts_positions_and_none_has_one_example_per_row():
    a, b = example([1, 7, 10], [11, 2], prefix=2), example([1, 7], [21, 2], prefix=1)
    assert lists(to_batch(pack([a, b], sequence_length=10, mode="packed"), 10)) == [
        [[1, 7, 10, 11, 2, 1, 7, 21, 2, 0]],
        [[1, 1, 1, 1, 1, 2, 2, 2, 2, -1]],
        [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]],
        [[-100, -100, 11, 2, -100, -100, 21, 2, -100, -100]],
    ]
    assert lists(to_batch(pack([b, a], sequence_length=5, mode="none"), 5, batch_size=3)) == [
        [[1, 7, 21, 2, 0], [1, 7, 10, 11, 2], [0, 0, 0, 0, 0]],
        [[1, 1, 1, 1, -1], [1, 1, 1, 1, 1], [-1, -1, -1, -1, -1]],
        [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]],
        [[-100, 21, 2, -100, -100], [-100, -100, 11, 2, -100], [-100] * 5],
    ]


def test_a_prompt_that_is_all_prefix_keeps_its_last_token():
    a, b = example([1, 7], [11, 2], prefix=2), example([1, 7, 20], [21, 2], prefix=2)
    assert lists(to_batch(pack([a, b], sequence_length=8, mode="shared_prefix"), 8)) == [
        [[1, 7, 20, 21, 2, 7, 11, 2]],
        [[0, 1, 1, 1, 1, 2, 2, 2]],
        [[0, 1, 2, 3, 4, 1, 2, 3]],
        [[-100, -100, 21, 2, -100, 11, 2, -100]],
    ]


def test_invalid_examples_are_refused():
    with pytest.raises(ValueError, match="do not begin with the same 2 tokens"):
        pack(
            [example([1, 7, 9], [2], prefix=2), example([1, 8, 9], [2], prefix=2)],
            sequence_length=9,
            mode="shared_prefix",
        )
    with pytest.raises(ValueError, match="example of 5 tokens does not fit into a row of 4"):
        pack([example([1, 2, 3], [4, 5])], sequence_length=4, mode="packed")
    with pytest.raises(ValueError, match="packing='dense': must be one of"):
        pack([], sequence_length=4, mode="dense")
    assert pack([], sequence_length=4, mode="shared_prefix") == []


@st.composite
def example_lists(draw):
    prefixes = {task: draw(st.lists(st.integers(3, 9), min_size=1, max_size=6)) for task in ("risk", "summary")}
    drawn = draw(
        st.lists(
            st.tuples(
                st.sampled_from(sorted(prefixes)),
                st.lists(st.integers(3, 99), max_size=12),
                st.lists(st.integers(3, 99), max_size=9),
            ),
            max_size=40,
        )
    )
    return [
        example(prefixes[task] + own, [*answer, 2], prefix=len(prefixes[task]), task=task, key=i)
        for i, (task, own, answer) in enumerate(drawn)
    ]


@given(example_lists(), st.sampled_from(["none", "packed", "shared_prefix"]), st.integers(28, 70))
@settings(max_examples=150, deadline=None)
def test_every_example_is_whole_and_in_one_row(examples, mode, sequence_length):
    rows = pack(examples, sequence_length=sequence_length, mode=mode)
    assert sorted(e.key for row in rows for e in row.examples) == [e.key for e in examples]
    batch = to_batch(rows, sequence_length)
    assert batch.supervised == (batch.labels_BT != -100).sum() == sum(len(e.completion_ids) for e in examples)
    for b, row in enumerate(rows):
        ids, segments, positions, labels = (
            t[b].numpy() for t in (batch.input_ids_BT, batch.segment_ids_BT, batch.position_ids_BT, batch.labels_BT)
        )
        assert row.tokens == (segments >= 0).sum() <= sequence_length
        assert mode != "none" or len(row.examples) == 1
        assert mode != "shared_prefix" or len({e.task for e in row.examples}) == 1
        for k, e in enumerate(row.examples, start=1):
            own = (segments == k) | (segments == 0)  # positions that the example's last token attends to
            whole = np.concatenate([e.prompt_ids, e.completion_ids])
            assert ids[own].tolist() == whole.tolist()
            assert positions[own].tolist() == list(range(len(whole)))
            expected = np.full(len(whole), -100)
            expected[len(e.prompt_ids) - 1 : -1] = e.completion_ids
            assert labels[own].tolist() == expected.tolist()
            assert (labels[segments == 0] == -100).all()
        assert (labels[segments == -1] == -100).all()
        assert (ids[segments == -1] == 0).all()


def naivebest_fit_decreasing(lengths, capacity):
    free = []
    for need in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= need]
        if fitting:
            free[free.index(min(fitting))] -= need
        else:
            free.append(capacity - need)
    return sorted(capacity - space for space in free)


@given(st.lists(st.integers(3, 50), min_size=1, max_size=120))
@settings(max_examples=100, deadline=None)
def test_no_more_rows_thanbest_fit_decreasing_needs(lengths):
    rows = pack([example([5] * n, [2]) for n in lengths], sequence_length=51, mode="packed")
    naive = naivebest_fit_decreasing([n + 1 for n in lengths], 51)
    assert len(rows) <= len(naive)
    alone = best_fit_decreasing([n + 1 for n in lengths], 51)
    assert sorted(sum(lengths[i] + 1 for i in row) for row in alone) == naive


@given(st.lists(st.integers(2, 41), min_size=1, max_size=14))
@settings(max_examples=100, deadline=None)
def test_the_first_row_bysubset_sums_is_as_full_as_possible(lengths):
    capacity = max(41, 8 * sum(lengths) // len(lengths) + 1)
    first = subset_sums(lengths, capacity)[0]
    others = sorted(lengths)[:-1]
    sums = {sum(chosen) + max(lengths) for k in range(len(others) + 1) for chosen in combinations(others, k)}
    assert sum(lengths[i] for i in first) == max(n for n in sums if n <= capacity)


def test_rows_of_the_real_tasks_are_full(shared_data):
    tasks = dict.fromkeys(("risk", "correlation", "summary", "triage", "remediation"), 1.0)
    options = {"sequence_length": 8192, "packing": "shared_prefix", "num_workers": 0}
    data = FindingsDataModule(
        [str(shared_data / "batches")], str(shared_data / "tokenizer"), task_weights=tasks, **options
    )
    data.setup()
    used = [int((batch.segment_ids_BT >= 0).sum()) for batch in data.train_batches()]
    assert sum(used) / (8192 * len(used)) >= 0.98


def test_rows_of_8192_tokens_are_full():
    lengths = np.random.default_rng(0).integers(200, 1100, 4000)
    examples = [example(range(n - 1), [2], prefix=100) for n in lengths]
    for mode in ("packed", "shared_prefix"):
        rows = pack(examples, sequence_length=8192, mode=mode)
        assert sum(row.tokens for row in rows) / (8192 * len(rows)) > 0.99


def test_exact_ids_and_labels_through_the_toy_tokenizer(mistral_tokenizer):
    chat = ChatFormat(mistral_tokenizer)
    task = Toy()
    pairs = [Pair("toy", content, answer, "low", "network", 1) for content, answer in (("a", "x"), ("bc", "yz"))]
    examples = chat.encode(task, pairs)
    prefix = chat.prefix_ids(task)
    batch = to_batch(pack(examples, sequence_length=200, mode="shared_prefix"), 200)
    n = len(prefix) + sum(len(e.prompt_ids) + len(e.completion_ids) - len(prefix) for e in examples)
    text = mistral_tokenizer.decode(batch.input_ids_BT[0, :n])
    assert text == "<s>[INST] Sys\n\nSay:\nbc[/INST] yz</s>a[/INST] x</s>"
    labels = batch.labels_BT[0][batch.labels_BT[0] != -100]
    assert mistral_tokenizer.convert_ids_to_tokens(labels) == ["▁", "<0x79>", "<0x7A>", "</s>", "▁", "<0x78>", "</s>"]


class Toy:
    name, system, instruction = "toy", "Sys", "Say:\n"


def loss_and_gradients(model, batches):
    """Sum of the losses over all labels, with a dense mask built from the contract's rule."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        q, k = batch.segment_ids_BT[:, :, None], batch.segment_ids_BT[:, None, :]
        causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        mask = causal & ((q == k) | ((k == 0) & (q > 0)))
        logits = model(
            batch.input_ids_BT,
            attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None],
            position_ids=batch.position_ids_BT,
        ).logits
        loss = cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("all_prefix", [False, True])
def test_modes_have_the_same_loss_and_gradients(tiny_llama, all_prefix):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").eval()
    generator = np.random.default_rng(0)
    prefix = [1, *generator.integers(3, 200, 10).tolist()]
    examples = [
        example(
            prefix + generator.integers(3, 200, n).tolist(),
            [*generator.integers(3, 200, m).tolist(), 2],
            prefix=11,
            key=n,
        )
        for n, m in ((0 if all_prefix else 1, 3), (17, 1), (5, 8), (9, 4), (2, 2))
    ]
    rows = {mode: pack(examples, sequence_length=53, mode=mode) for mode in ("none", "packed", "shared_prefix")}
    assert len(rows["none"]) == 5 > len(rows["packed"]) >= len(rows["shared_prefix"])
    loss, gradients = loss_and_gradients(model, [to_batch([row], row.tokens) for row in rows["none"]])  # no padding
    for mode in rows:
        other, others = loss_and_gradients(model, [to_batch(rows[mode], 53)])
        assert other == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_row_counts_its_tokens():
    a = example([1, 7, 10], [11, 2], prefix=2)
    assert Row([a]).tokens == 5
    assert Row([a, a], prefix_length=2).tokens == 8
