"""The split: a digest of the input, stable over versions, without leaks."""

from dataclasses import replace
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.errors import UserError
from datamodules.records import Correlation, Document
from datamodules.stream.splits import SPLITS, input_key, split_document, split_of
from tests.helpers.findings_data import parsed_finding


def make_correlation(identity: str, finding_ids: list[str]) -> Correlation:
    return Correlation(identity, "t", "d", "c2", 0.5, finding_ids)


@st.composite
def documents(draw):
    kinds = draw(st.lists(st.integers(0, 12), max_size=30))
    findings = [parsed_finding(f"f{index}", kind) for index, kind in enumerate(kinds)]
    some_ids = st.lists(st.integers(0, 40).map(lambda index: f"f{index}"), max_size=6)
    references = draw(st.lists(some_ids, max_size=6))
    correlations = [make_correlation(f"c{index}", ids) for index, ids in enumerate(references)]
    return Document("s", "m", 0, findings, correlations, {"executive_summary": "all"}, [{"id": "a"}])


def test_key_is_a_digest_of_canonical_json():
    canonical = b'["network","title 7","text",{"port":7,"state":"LISTEN"}]'
    expected = int.from_bytes(blake2b(canonical, digest_size=8).digest(), "big")
    # a fixed value too: another one means that the splits of all users change
    assert input_key(parsed_finding("x", 7)) == expected == 0x3485382519F28CF8


def test_key_depends_on_the_input_only():
    finding = parsed_finding("a", 1)
    answered = replace(finding, id="b", severity="critical", risk_score=99.0, tags=["x"], rationale=["y"])
    reordered = replace(finding, metadata={"state": "LISTEN", "port": 1})
    assert input_key(finding) == input_key(answered) == input_key(reordered)
    for change in ({"title": "z"}, {"description": "z"}, {"category": "z"}, {"metadata": {}}):
        assert input_key(replace(finding, **change)) != input_key(finding)
    # the border between fields is part of the key
    assert input_key(replace(finding, title="ab", description="c")) != input_key(
        replace(finding, title="a", description="bc")
    )


def test_key_of_metadata_that_json_cannot_represent():
    deep = []
    for _ in range(400):
        deep = [deep]
    values = [{"deep": deep}, {"big": 10**400}, {"surrogate": "\ud800"}, {1: "number as key"}, {"bytes": b"\x00"}]
    keys = {input_key(replace(parsed_finding("a"), metadata=value)) for value in values}
    assert len(keys) == len(values)


def test_fractions_and_seeds():
    keys = [input_key(parsed_finding("a", kind)) for kind in range(4000)]
    splits = [split_of(key, val_fraction=0.1, test_fraction=0.2, seed=0) for key in keys]
    assert splits.count("val") / len(keys) == pytest.approx(0.1, abs=0.02)
    assert splits.count("test") / len(keys) == pytest.approx(0.2, abs=0.025)
    other = [split_of(key, val_fraction=0.1, test_fraction=0.2, seed=1) for key in keys]
    # two independent draws agree with probability 0.7^2 + 0.1^2 + 0.2^2 = 0.54
    assert sum(map(str.__eq__, splits, other)) / len(keys) == pytest.approx(0.54, abs=0.03)
    assert {split_of(key, val_fraction=0, test_fraction=0, seed=0) for key in keys} == {"train"}


@settings(max_examples=60, deadline=None)
@given(documents(), st.integers(0, 3))
def test_equal_inputs_are_never_in_two_splits(document, seed):
    parts = split_document(document, val_fraction=0.3, test_fraction=0.3, seed=seed)
    assert tuple(parts) == SPLITS
    keys = [{input_key(finding) for finding in part.findings} for part in parts.values()]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    ids = [finding.id for part in parts.values() for finding in part.findings]
    assert sorted(ids) == sorted(finding.id for finding in document.findings)
    order = {finding.id: index for index, finding in enumerate(document.findings)}
    for part in parts.values():
        positions = [order[finding.id] for finding in part.findings]
        assert positions == sorted(positions)


@settings(max_examples=60, deadline=None)
@given(documents())
def test_a_correlation_is_in_the_split_of_its_first_finding(document):
    before = [list(correlation.finding_ids) for correlation in document.correlations]
    parts = split_document(document, val_fraction=0.3, test_fraction=0.3, seed=0)
    assert [correlation.finding_ids for correlation in document.correlations] == before, "the input was changed"
    split_by_id = {finding.id: split for split, part in parts.items() for finding in part.findings}
    placed = {
        correlation.id: (split, correlation) for split, part in parts.items() for correlation in part.correlations
    }
    assert len(placed) == len(document.correlations)
    for original in document.correlations:
        split, correlation = placed[original.id]
        present = [key for key in original.finding_ids if key in split_by_id]
        if not present:
            assert split == "train"
            assert correlation is original
        else:
            assert split == split_by_id[present[0]]
            assert [key for key in correlation.finding_ids if key in split_by_id] == [
                key for key in present if split_by_id[key] == split
            ]


@settings(max_examples=40, deadline=None)
@given(documents())
def test_summaries_stay_with_all_findings(document):
    for part in split_document(document, val_fraction=0.3, test_fraction=0.3, seed=0).values():
        whole = bool(document.findings) and len(part.findings) == len(document.findings)
        assert bool(part.summaries) == bool(part.actions) == whole


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.0), (0.0, -0.1), (0.5, 0.5), (1.0, 0.0)])
def test_impossible_fractions(val, test):
    with pytest.raises(UserError, match="val_fraction="):
        split_document(Document("s", "m", 0), val_fraction=val, test_fraction=test, seed=0)
