"""The key set against Python's set, its memory at the size of the whole archive, and merged conflicts."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.records import Document
from datamodules.stream.dedup import Deduplicator, HashSet, merge_conflicts
from tests.helpers.findings_data import parsed_finding

keys = st.one_of(st.integers(0, 40), st.integers(2**64 - 40, 2**64 - 1), st.integers(0, 2**64 - 1))


@given(st.lists(st.lists(keys, max_size=300), max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_key_set_is_a_set_that_keeps_the_order_of_arrival(batches):
    hash_set, reference = HashSet(), {}
    for batch in batches:
        new = hash_set.add(np.array(batch, np.uint64))
        assert new.tolist() == [key not in reference and key not in batch[:i] for i, key in enumerate(batch)]
        reference |= dict.fromkeys(batch)
        assert hash_set.first(len(hash_set)).tolist() == list(reference)
    half = len(hash_set) // 2
    restored = HashSet(hash_set.first(half))
    assert restored.add(hash_set.first(len(hash_set))).tolist() == [i >= half for i in range(len(hash_set))]


def test_first_keys_never_change_when_keys_are_added():
    hash_set = HashSet(np.arange(500, dtype=np.uint64))
    before = hash_set.first(500)
    hash_set.add(np.arange(100_000, dtype=np.uint64)[::-1].copy())
    assert before.tolist() == hash_set.first(500).tolist() == list(range(500))


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


def test_duplicates_and_conflicts_are_distinguished():
    seen = Deduplicator()
    key, given_input = np.array([1, 2, 1, 3, 4], np.uint64), np.array([10, 20, 10, 10, 40], np.uint64)
    duplicate, conflict = seen.add(key, given_input)
    assert duplicate.tolist() == [False, False, True, False, False]
    assert conflict.tolist() == [False, False, False, True, False]  # input 10 again, with answer 3
    duplicate, conflict = seen.add(np.array([3, 5, 6], np.uint64), np.array([10, 20, 60], np.uint64))
    assert duplicate.tolist() == [True, False, False]
    assert conflict.tolist() == [False, True, False]


def test_conflicting_answers_become_the_one_nearest_to_the_median_with_the_median_of_each_number():
    findings = [
        parsed_finding("a", 1, risk_score=20.0, severity="low", risk_subscores={"impact": 0.1}, tags=["a"]),
        parsed_finding("b", 2, risk_score=77.0),
        parsed_finding("c", 1, risk_score=50.0, severity="medium", risk_subscores={"impact": 0.4}, tags=["c"]),
        parsed_finding("d", 1, risk_score=90.0, severity="high", probability_actionable=0.8, correlation_refs=["x"]),
    ]
    document = Document("source", "member", 0, list(findings))
    merged, changed = merge_conflicts(document)
    assert document.findings == findings, "the input was changed"
    assert changed == 3
    assert [finding.id for finding in merged.findings] == ["a", "b", "c", "d"]
    assert merged.findings[1] is findings[1]
    answers = [merged.findings[index] for index in (0, 2, 3)]
    assert {finding.risk_score for finding in answers} == {50.0}
    assert {finding.severity for finding in answers} == {"medium"}
    assert [finding.tags for finding in answers] == [["c"]] * 3
    assert {finding.probability_actionable for finding in answers} == {0.8}  # the only one
    assert [finding.risk_subscores for finding in answers] == [{"impact": 0.25}] * 3  # the median of 0.1 and 0.4
    assert [finding.correlation_refs for finding in answers] == [[], [], ["x"]]


def test_equal_answers_are_no_conflict():
    findings = [parsed_finding("a", 1), parsed_finding("b", 1), parsed_finding("c", 2, risk_score=80.0)]
    merged, changed = merge_conflicts(Document("source", "member", 0, findings))
    assert changed == 0
    assert merged.findings == findings
