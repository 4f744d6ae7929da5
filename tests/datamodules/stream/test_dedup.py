"""The key set against Python's set, and its memory at the size of the whole archive."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.stream.dedup import Deduplicator, HashSet

keys = st.one_of(st.integers(0, 40), st.integers(2**64 - 40, 2**64 - 1), st.integers(0, 2**64 - 1))


@given(st.lists(st.lists(keys, max_size=300), max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_key_set_is_a_set_that_keeps_the_order_of_arrival(batches):
    ours, theirs = HashSet(), {}
    for batch in batches:
        new = ours.add(np.array(batch, np.uint64))
        assert new.tolist() == [key not in theirs and key not in batch[:i] for i, key in enumerate(batch)]
        theirs |= dict.fromkeys(batch)
        assert ours.first(len(ours)).tolist() == list(theirs)
    half = len(ours) // 2
    restored = HashSet(ours.first(half))
    assert restored.add(ours.first(len(ours))).tolist() == [i >= half for i in range(len(ours))]


def test_first_keys_never_change_whatever_is_added_later():
    ours = HashSet(np.arange(500, dtype=np.uint64))
    before = ours.first(500)
    ours.add(np.arange(100_000, dtype=np.uint64)[::-1].copy())
    assert before.tolist() == ours.first(500).tolist() == list(range(500))


def test_the_whole_archive_stays_below_100_megabytes():
    seen = Deduplicator()
    rng = np.random.default_rng(0)
    for _ in range(50):
        block = rng.integers(0, 2**64, 50_000, dtype=np.uint64)
        duplicate, conflict = seen.add(block, block)
        assert not duplicate.any()
        assert not conflict.any()
    assert len(seen.keys) == 2_500_000
    assert seen.keys.nbytes + seen.inputs.nbytes < 100e6


def test_duplicates_and_conflicts_are_told_apart():
    seen = Deduplicator()
    key, given_input = np.array([1, 2, 1, 3, 4], np.uint64), np.array([10, 20, 10, 10, 40], np.uint64)
    duplicate, conflict = seen.add(key, given_input)
    assert duplicate.tolist() == [False, False, True, False, False]
    assert conflict.tolist() == [False, False, False, True, False]  # input 10 again, with answer 3
    duplicate, conflict = seen.add(np.array([3, 5, 6], np.uint64), np.array([10, 20, 60], np.uint64))
    assert duplicate.tolist() == [True, False, False]
    assert conflict.tolist() == [False, True, False]
