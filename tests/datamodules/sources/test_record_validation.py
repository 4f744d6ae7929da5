"""Validation of records: repaired, rejected and unchanged ones; rows of tables."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.records import CATEGORIES, SEVERITIES, SUBSCORES
from datamodules.sources.decompression import DuplicateKeys
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.record_validation import count_characters, read_correlation, read_finding, record_of_row

GOOD = {
    "id": "suid_1",
    "title": "SUID/SGID binary",
    "severity": "high",
    "risk_score": 80.0,
    "base_severity_score": 80,
    "description": "Binary has SUID or SGID bit set",
    "metadata": {"expected": "false", "pid": "2742"},
    "category": "suid",
    "tags": ["filesystem"],
    "risk_subscores": {"impact": 0.7, "exposure": 0.8, "anomaly": 0.8, "confidence": 0.9},
    "correlation_refs": [],
    "baseline_status": "existing",
    "probability_actionable": 0.67,
    "rationale": None,
}


STRING = {"number_from_string": 1}


def read(**changes):
    repairs = Counter()
    record = {**GOOD, **changes}
    record = {name: value for name, value in record.items() if value is not ...}  # ... removes a field
    return read_finding(record, repairs), +repairs


def test_a_good_record_needs_no_repair():
    finding, repairs = read()
    assert not repairs
    assert (finding.id, finding.severity, finding.risk_score, finding.category) == ("suid_1", "high", 80.0, "suid")
    assert finding.metadata == {"expected": "false", "pid": "2742"}  # strings in metadata stay strings
    assert finding.risk_subscores["confidence"] == 0.9
    assert finding.rationale == []


@pytest.mark.parametrize(
    ("changes", "field", "value", "repairs"),
    [
        ({"risk_score": "70"}, "risk_score", 70.0, {"number_from_string": 1}),
        ({"risk_score": ...}, "risk_score", 80.0, {"risk_score_from_base": 1}),
        ({"risk_score": None}, "risk_score", 80.0, {"risk_score_from_base": 1}),
        ({"risk_score": "high"}, "risk_score", 80.0, {"unreadable_number": 1, "risk_score_from_base": 1}),
        ({"risk_score": True}, "risk_score", 80.0, {"unreadable_number": 1, "risk_score_from_base": 1}),
        ({"risk_score": 130.0}, "risk_score", 100.0, {"score_clamped": 1}),
        ({"risk_score": -3}, "risk_score", 0.0, {"score_clamped": 1}),
        ({"base_severity_score": None}, "base_severity_score", 80.0, {"base_from_risk_score": 1}),
        ({"severity": "HIGH"}, "severity", "high", {"severity_alias": 1}),
        ({"severity": "moderate"}, "severity", "medium", {"severity_alias": 1}),
        ({"severity": "error"}, "severity", "high", {"severity_from_score": 1}),
        ({"severity": ["high"]}, "severity", "high", {"severity_from_score": 1}),
        ({"severity": None, "risk_score": 25.0}, "severity", "low", {"severity_from_score": 1}),
        ({"category": "firmware"}, "category", "firmware", {"unknown_category": 1}),
        ({"category": "kernel_module"}, "category", "modules", {"category_alias": 1}),
        ({"category": None}, "category", "unknown", {"category_missing": 1}),
        ({"tags": None}, "tags", [], {"null_tags": 1}),
        ({"tags": "a, b,"}, "tags", ["a", "b"], {"list_from_string": 1}),
        ({"tags": ["a", 3, {}]}, "tags", ["a", "3"], {"text_from_number": 1, "list_item_dropped": 1}),
        ({"rationale": "because"}, "rationale", ["because"], {}),
        ({"rationale": ["one", "two"]}, "rationale", ["one", "two"], {}),
        ({"rationale": {"why": 1}}, "rationale", [], {"rationale_dropped": 1}),
        ({"metadata": None}, "metadata", {}, {"null_metadata": 1}),
        ({"metadata": '{"pid": "1"}'}, "metadata", {"pid": "1"}, {"metadata_from_string": 1}),
        ({"metadata": [1, 2]}, "metadata", {"value": [1, 2]}, {"metadata_wrapped": 1}),
        ({"title": None}, "title", "Binary has SUID or SGID bit set", {"null_title": 1, "title_from_description": 1}),
        ({"description": ...}, "description", "", {"null_description": 1}),
        ({"id": 17}, "id", "17", {"text_from_number": 1}),
        ({"baseline_status": "fresh"}, "baseline_status", "unknown", {"unknown_baseline": 1}),
        ({"baseline_status": ...}, "baseline_status", "unknown", {}),
        ({"probability_actionable": "0.5"}, "probability_actionable", 0.5, {"number_from_string": 1}),
        ({"probability_actionable": 1.5}, "probability_actionable", 1.0, {"subscore_clamped": 1}),
        ({"probability_actionable": ...}, "probability_actionable", None, {}),
        ({"risk_subscores": {"impact": "0.5", "anomaly": None}}, "risk_subscores", {"impact": 0.5}, STRING),
        ({"risk_subscores": {"impact": 7}}, "risk_subscores", {"impact": 1.0}, {"subscore_clamped": 1}),
        ({"risk_subscores": [1]}, "risk_subscores", {}, {"unreadable_number": 1}),
    ],
)  # fmt: skip
def test_repairs_are_made_and_counted(changes, field, value, repairs):
    finding, counted = read(**changes)
    assert getattr(finding, field) == value
    assert counted == repairs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"title": "", "description": None}, "no_text"),
        ({"severity": None, "risk_score": None, "base_severity_score": None}, "no_severity_or_score"),
        ({"severity": "purple", "risk_score": ..., "base_severity_score": ...}, "no_severity_or_score"),
        ({"risk_score": "NaN"}, "non_finite"),
        ({"risk_score": "1e999"}, "non_finite"),
        ({"risk_score": 10**400}, "non_finite"),
        ({"risk_subscores": {"impact": "inf"}}, "non_finite"),
        ({"description": "x" * (10 << 20)}, "too_large"),
        ({"metadata": {"command": "x" * (10 << 20)}}, "too_large"),
        ({"id": "x" * (10 << 20)}, "too_large"),
        ({"tags": ["x" * (10 << 20)]}, "too_large"),
    ],
)
def test_unusable_records_are_rejected(changes, reason):
    with pytest.raises(InvalidRecord) as caught:
        read(**changes)
    assert caught.value.reason == reason


@pytest.mark.parametrize("record", [None, [], "text", 3, True])
def test_a_record_that_is_not_an_object_is_rejected(record):
    for reader in (read_finding, read_correlation):
        with pytest.raises(InvalidRecord, match="not_an_object"):
            reader(record, Counter())


@pytest.mark.parametrize("identity", ["fine", None])
def test_too_deep_metadata_are_rejected_at_the_limit(identity):
    deep = "leaf"
    for _ in range(63):
        deep = {"a": deep}
    read(metadata={"a": deep}, id=identity)  # 64 levels
    for extra in (1, 900):
        deeper = deep
        for _ in range(extra):
            deeper = [deeper]
        with pytest.raises(InvalidRecord, match="too_deep"):
            read(metadata={"a": deeper}, id=identity)


def test_the_list_of_a_record_names_category_and_severity():
    repairs = Counter()
    record = {name: value for name, value in GOOD.items() if name not in ("category", "severity")}
    finding = read_finding(record, repairs, "dns", "critical")
    assert (finding.category, finding.severity) == ("dns", "critical")
    assert not +repairs


def test_a_missing_id_is_built_from_the_content():
    first, repairs = read(id=None)
    again, _ = read(id="")
    other, _ = read(id=None, title="Another")
    assert first.id == again.id != other.id
    assert first.id.startswith("finding_")
    assert repairs == {"id_from_content": 1}


def test_enrichment_is_read_unless_it_failed():
    good = {"mitigation_steps": ["chmod u-s"], "attack_vectors": "local", "business_impact": "root", "other": 1}
    assert read(_langchain_enrichment=good)[0].enrichment == {
        "mitigation_steps": ["chmod u-s"],
        "attack_vectors": ["local"],
        "business_impact": "root",
    }
    assert read(_langchain_enrichment={"error": "timeout", "fallback": True})[0].enrichment == {}
    assert read(_langchain_enrichment={"fallback": True, "mitigation_steps": ["x"]})[0].enrichment == {}
    assert read(_langchain_enrichment="text")[0].enrichment == {}


def test_correlation_of_a_batch_and_of_ground_truth():
    repairs = Counter()
    batch = read_correlation(
        {
            "id": "corr_1", "title": "SUID in a world-writable place", "description": "Together they escalate",
            "correlation_type": "suid_world_writable", "correlation_strength": 0.74, "severity": "critical",
            "risk_score": "90", "correlation_refs": ["a", "b"], "tags": ["correlation"],
            "metadata": {"insight": "chain of two", "generator": "langchain"}, "rationale": "by producer",
        },
        repairs,
    )  # fmt: skip
    assert batch.finding_ids == ["a", "b"]
    assert (batch.strength, batch.risk_score, batch.insight) == (0.74, 90.0, "chain of two")
    assert batch.description == "Together they escalate"
    assert repairs == {"number_from_string": 1}
    truth = read_correlation(
        {"id": "c", "title": "t", "rationale": "why", "related_finding_ids": ["x"], "correlation_refs": ["y"],
         "risk_score_delta": 5, "severity": None}, Counter()
    )  # fmt: skip
    assert (truth.finding_ids, truth.description, truth.risk_score_delta) == (["x"], "why", 5.0)
    assert truth.severity is None and truth.risk_score is None and truth.strength is None


def test_keys_and_text_are_counted_at_every_level():
    assert count_characters({"ab": "cde", "f": [{"g": "hi"}, "j"], "n": 5}) == len("abcdefghijn")
    assert count_characters({"a": DuplicateKeys(b="c")}) == 3
    assert count_characters({}) == 0


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"id": "f", "metadata": {"pid": "1", "port": None}}, {"id": "f", "metadata": {"pid": "1"}}),
        ({"id": "f", "tags": None}, {"id": "f"}),
        ({"tags": '["a", "b"]'}, {"tags": ["a", "b"]}),
        ({"tags": "a, b"}, {"tags": "a, b"}),
        ({"metadata": ' {"x": 1}'}, {"metadata": {"x": 1}}),
        ({"metadata": "{broken"}, {"metadata": "{broken"}),
        ({"title": '{"x": 1}'}, {"title": '{"x": 1}'}),  # only known fields hold JSON
        ({"risk_subscores": [("impact", 0.5), ("anomaly", None)]}, {"risk_subscores": {"impact": 0.5}}),
        ({"x": [(1, 2), (3,)], "y": [None, 1]}, {"x": [[1, 2], [3]], "y": [1]}),
        ({"when": b"\xff", "ok": True}, {"when": "b'\\xff'", "ok": True}),
        ("text", "text"),
    ],
)
def test_a_row_becomes_the_record_of_json(row, record):
    assert record_of_row(row) == record


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "_langchain_enrichment"]), JSON))
def test_any_values_in_any_fields_are_rejected_or_valid(changes):
    repairs = Counter()
    try:
        finding = read_finding({**GOOD, **changes}, repairs)
    except InvalidRecord as error:
        assert error.reason
        return
    assert finding.severity in SEVERITIES
    assert 0.0 <= finding.risk_score <= 100.0 and 0.0 <= finding.base_severity_score <= 100.0
    assert finding.id and finding.title and isinstance(finding.description, str)
    assert finding.category and finding.category == finding.category.strip().lower()
    assert all(type(tag) is str for tag in [*finding.tags, *finding.rationale, *finding.correlation_refs])
    assert set(finding.risk_subscores) <= set(SUBSCORES)
    assert all(0.0 <= score <= 1.0 for score in finding.risk_subscores.values())
    assert all(count > 0 for count in (+repairs).values())
    if not changes:
        assert finding.category in CATEGORIES


CORRELATION_FIELDS = (
    "id", "title", "description", "rationale", "correlation_refs", "metadata", "related_finding_ids", "severity",
    "risk_score", "correlation_strength", "tags", "correlation_type",
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(CORRELATION_FIELDS), JSON))
def test_any_correlation_is_rejected_or_valid(record):
    try:
        correlation = read_correlation(record, Counter())
    except InvalidRecord:
        return
    assert correlation.id and correlation.title
    assert all(type(name) is str for name in correlation.finding_ids)
    assert correlation.severity is None or correlation.severity in SEVERITIES
    assert correlation.strength is None or 0.0 <= correlation.strength <= 1.0
