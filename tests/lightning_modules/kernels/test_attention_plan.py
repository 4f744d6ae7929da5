"""The tables of an attention plan against the batch contract's rule, pair by pair."""

import numpy as np
import pytest
import torch

from lightning_modules.kernels.attention_plan import KEYS, build_attention_plan, query_tokens
from tests.helpers.packed_rows import LAYOUTS, layout_ids, segment_ids


@pytest.mark.parametrize("group", [1, 3, 4, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tables_cover_every_allowed_pair_once(layout, group):
    ids = layout_ids(layout)
    tables = build_attention_plan(ids, group).tables
    flat, tokens = ids.reshape(-1).numpy(), ids.shape[1]
    index = np.arange(len(flat))
    same_row = index[:, None] // tokens == index // tokens
    allowed = (index[:, None] >= index) & same_row & (
        (flat[:, None] == flat) & (flat >= 0) | (flat == 0) & (flat[:, None] > 0)
    )  # fmt: skip
    allowed |= np.eye(len(flat), dtype=bool)  # a token of padding attends to itself
    starts, prefix = tables.starts_N.numpy(), tables.prefix_N.numpy()
    own = (index >= starts[:, None]) & (index <= index[:, None])
    shared = (index < prefix[:, None]) & (index >= (index // tokens * tokens)[:, None])
    by_queries, by_keys = np.zeros_like(allowed, int), np.zeros_like(allowed, int)
    for first, last, key, prefix_first, prefix_last in tables.queries.numpy():
        by_queries[first:last, key:last] += own[first:last, key:last]
        by_queries[first:last, prefix_first:prefix_last] += shared[first:last, prefix_first:prefix_last]
    for first, last, query, query_last, slot in tables.keys.numpy():
        mask = own if slot < 0 else shared
        by_keys[query:query_last, first:last] += mask[query:query_last, first:last]
    assert (by_queries == allowed).all()
    assert (by_keys == allowed).all()


def test_bounds_prefixes_and_longest_example():
    plan = build_attention_plan(segment_ids([(0, 7), (1, 5), (2, 13)], [(1, 20)], tokens=30), 4)
    assert plan.bounds == (0, 7, 12, 25, 30, 50, 60)
    assert plan.longest == 20  # the second row's; 7 + 13 in the first
    (prefix,) = plan.prefixes
    assert (prefix.first, prefix.end, prefix.last) == (0, 7, 25)


def test_a_prefix_without_examples_has_no_span():
    assert build_attention_plan(segment_ids([(0, 7)], [(0, 9)], tokens=9), 1).prefixes == ()


def test_the_longest_example_counts_its_prefix():
    plan = build_attention_plan(segment_ids([(0, 4), (1, 5), (2, 11)], tokens=20), 1)
    assert plan.longest == 4 + 11


def test_padding_is_not_an_example():
    """A row of padding longer than the attention window of a model must not count as an example."""
    assert build_attention_plan(segment_ids([(1, 5)], [], tokens=20), 1).longest == 5
    assert build_attention_plan(segment_ids([], tokens=20), 1).longest == 0


def test_a_prefix_counts_for_the_examples_of_its_row_only():
    assert build_attention_plan(segment_ids([(0, 6), (1, 3)], [(1, 8)], tokens=12), 1).longest == 9


@pytest.mark.parametrize(("group", "tokens"), [(1, 128), (2, 64), (3, 32), (4, 32), (7, 16), (8, 16), (16, 16)])
def test_tokens_of_a_block_of_queries(group, tokens):
    assert query_tokens(group) == tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_blocks_come_first_and_slots_are_distinct(layout):
    tables = build_attention_plan(layout_ids(layout), 4).tables
    first, last, own, prefix_first, prefix_last = tables.queries.long().T
    keys = last - own + prefix_last - prefix_first
    assert (keys.diff() <= 0).all()
    assert (last > first).all()
    queries = tables.keys[:, 3] - tables.keys[:, 2]
    assert (queries.diff() <= 0).all()
    assert (tables.keys[:, 1] - tables.keys[:, 0] <= KEYS).all()
    slots = tables.keys[:, 4]
    slots = slots[slots >= 0]
    assert sorted(slots.tolist()) == list(range(len(slots)))


def test_a_copy_to_a_device_keeps_types_and_values():
    plan = build_attention_plan(layout_ids("prefix"), 2)
    copy = plan.to("meta")
    for name in ("starts_N", "prefix_N", "queries", "keys"):
        tensor, original = getattr(copy.tables, name), getattr(plan.tables, name)
        assert tensor.device.type == "meta"
        assert tensor.shape == original.shape and tensor.dtype == original.dtype == torch.int32
    assert (copy.bounds, copy.prefixes) == (plan.bounds, plan.prefixes)
    assert torch.equal(plan.to("cpu").tables.queries, plan.tables.queries)
