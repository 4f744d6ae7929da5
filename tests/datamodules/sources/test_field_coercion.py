"""Fields of records: every function with valid, repairable and invalid values, and its counts."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.records import BASELINE_STATUSES, CATEGORIES, SEVERITIES, SUBSCORES
from datamodules.sources import field_coercion
from datamodules.sources.field_coercion import (
    CATEGORY_ALIASES,
    DEFAULT_SCORES,
    SEVERITY_ALIASES,
    InvalidRecord,
)


def call(function, *arguments):
    """The result of a function of field_coercion and the repairs that it counted."""
    repairs = Counter()
    result = getattr(field_coercion, function)(*arguments, repairs)
    return result, dict(+repairs)


def reason(function, *arguments):
    with pytest.raises(InvalidRecord) as caught:
        call(function, *arguments)
    return caught.value.reason


def test_an_invalid_record_has_a_reason_and_a_detail():
    error = InvalidRecord("too_large", "9 bytes")
    assert (error.reason, error.detail, str(error)) == ("too_large", "9 bytes", "too_large: 9 bytes")
    assert str(InvalidRecord("empty")) == "empty"


@pytest.mark.parametrize(
    ("value", "expected", "repairs"),
    [
        (3.5, 3.5, {}),
        (-7, -7.0, {}),
        (None, None, {}),
        ("", None, {}),
        ("70", 70.0, {"number_from_string": 1}),
        (" 1e2\n", 100.0, {"number_from_string": 1}),
        ("high", None, {"unreadable_number": 1}),
        (True, None, {"unreadable_number": 1}),
        ([1], None, {"unreadable_number": 1}),
        ({}, None, {"unreadable_number": 1}),
    ],
)
def test_number(value, expected, repairs):
    result, counted = call("number", value, "risk_score")
    assert (result, type(result), counted) == (expected, type(expected), repairs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "NaN", "-inf", "1e999", 10**400])
def test_a_number_that_is_not_finite_is_invalid(value):
    with pytest.raises(InvalidRecord, match=r"^non_finite: risk_score$"):
        field_coercion.number(value, "risk_score", Counter())


@pytest.mark.parametrize(
    ("value", "expected", "repairs"),
    [
        (["a", "b"], ["a", "b"], {}),
        ([], [], {}),
        (("a",), ["a"], {}),
        (None, [], {"null_tags": 1}),
        ("a, b,,", ["a", "b"], {"list_from_string": 1}),
        ("", [], {"list_from_string": 1}),
        (["a", 3, 2.5], ["a", "3", "2.5"], {"text_from_number": 2}),
        (["a", None, {}], ["a"], {"list_item_dropped": 2}),
        ([1, [2]], ["1"], {"text_from_number": 1, "list_item_dropped": 1}),
        ({"a": 1}, [], {"list_item_dropped": 1}),
        (7, [], {"list_item_dropped": 1}),
    ],
)
def test_strings(value, expected, repairs):
    assert call("strings", value, "tags") == (expected, repairs)


def test_strings_are_a_copy():
    value = ["a"]
    assert field_coercion.strings(value, "tags", Counter()) is not value


@pytest.mark.parametrize(
    ("record", "expected", "repairs"),
    [
        ({"title": "t", "description": "d"}, ("t", "d"), {}),
        ({"title": "t", "description": ""}, ("t", ""), {}),
        ({"title": "t"}, ("t", ""), {"null_description": 1}),
        ({"title": 4, "description": 2.5}, ("4", "2.5"), {"text_from_number": 2}),
        ({"title": "", "description": "d"}, ("d", "d"), {"title_from_description": 1}),
        (
            {"title": ["x"], "description": "d" * 99},
            ("d" * 80, "d" * 99),
            {"null_title": 1, "title_from_description": 1},
        ),
    ],
)
def test_texts(record, expected, repairs):
    assert call("texts", record) == (expected, repairs)


@pytest.mark.parametrize("record", [{}, {"title": "", "description": ""}, {"title": None, "description": []}])
def test_a_record_without_text_is_invalid(record):
    assert reason("texts", record) == "no_text"


@pytest.mark.parametrize(
    ("value", "expected", "repairs"),
    [
        ("x", "x", {}),
        ("", "", {}),
        (3, "3", {"text_from_number": 1}),
        (True, "True", {"text_from_number": 1}),
        (None, "", {"null_title": 1}),
        ({"a": 1}, "", {"null_title": 1}),
    ],
)
def test_plain_text(value, expected, repairs):
    assert call("plain_text", value, "title") == (expected, repairs)


@pytest.mark.parametrize(
    ("fields", "default", "expected", "repairs"),
    [
        (("high", 75.0, 70.0), "", ("high", 75.0, 70.0), {}),
        (("high", 75, 0), "low", ("high", 75.0, 0.0), {}),
        (("low", None, 70.0), "", ("low", 70.0, 70.0), {"risk_score_from_base": 1}),
        (("low", 30.0, None), "", ("low", 30.0, 30.0), {"base_from_risk_score": 1}),
        (("critical", None, None), "", ("critical", 90.0, 90.0), {"score_from_severity": 1, "base_from_risk_score": 1}),
        ((None, None, None), "medium", ("medium", 50.0, 50.0), {"score_from_severity": 1, "base_from_risk_score": 1}),
        ((None, 75.0, 70.0), "critical", ("critical", 75.0, 70.0), {}),
        ((None, 75.0, 70.0), "", ("high", 75.0, 70.0), {"severity_from_score": 1}),
        (("odd", 75.0, 70.0), "", ("high", 75.0, 70.0), {"severity_from_score": 1}),
        (("WARN", 45.0, 45.0), "", ("medium", 45.0, 45.0), {"severity_alias": 1}),
        (("high", 130.0, -5.0), "", ("high", 100.0, 0.0), {"score_clamped": 2}),
        ((None, -1.0, 5.0), "", ("info", 0.0, 5.0), {"score_clamped": 1, "severity_from_score": 1}),
        (("high", "75", "x"), "", ("high", 75.0, 75.0),
         {"number_from_string": 1, "unreadable_number": 1, "base_from_risk_score": 1}),
    ],
)  # fmt: skip
def test_severity_and_scores(fields, default, expected, repairs):
    record = dict(zip(("severity", "risk_score", "base_severity_score"), fields, strict=True))
    assert call("severity_and_scores", record, default) == (expected, repairs)


def test_a_record_without_severity_and_score_is_invalid():
    assert reason("severity_and_scores", {"severity": "odd"}, "odder") == "no_severity_or_score"
    assert reason("severity_and_scores", {}, "") == "no_severity_or_score"
    assert reason("severity_and_scores", {"severity": "high", "risk_score": "NaN"}, "") == "non_finite"
    assert reason("severity_and_scores", {"severity": "high", "base_severity_score": 10**400}, "") == "non_finite"


@pytest.mark.parametrize(
    ("score", "severity"),
    [(0, "info"), (19.9, "info"), (20, "low"), (39.9, "low"), (40, "medium"), (69.9, "medium"), (70, "high"),
     (89.9, "high"), (90, "critical"), (100, "critical")],
)  # fmt: skip
def test_severity_of_a_score(score, severity):
    assert call("severity_and_scores", {"risk_score": float(score)}, "")[0][0] == severity


def test_default_scores_are_inside_their_own_band():
    for severity, score in DEFAULT_SCORES.items():
        assert call("severity_and_scores", {"risk_score": score}, "")[0][0] == severity


@pytest.mark.parametrize("word", SEVERITIES)
def test_a_severity_in_any_case(word):
    assert call("severity_word", word) == (word, {})
    assert call("severity_word", f" {word.upper()}\n") == (word, {"severity_alias": 1})


def test_severity_aliases():
    assert set(SEVERITY_ALIASES.values()) <= set(SEVERITIES)
    for alias, word in SEVERITY_ALIASES.items():
        assert call("severity_word", alias.title()) == (word, {"severity_alias": 1})
    for value in ("", "odd", None, 3, ["high"]):
        assert call("severity_word", value) == (None, {})


@pytest.mark.parametrize(
    ("value", "default", "expected", "repairs"),
    [
        ("dns", "", "dns", {}),
        (" DNS ", "ioc", "dns", {}),
        ("firmware", "dns", "firmware", {"unknown_category": 1}),
        (None, "dns", "dns", {}),
        ("", "Process", "processes", {"category_alias": 1}),
        (3, "odd", "odd", {"unknown_category": 1}),
        (None, "", "unknown", {"category_missing": 1}),
        (None, "  ", "unknown", {"category_missing": 1}),
    ],
)
def test_category(value, default, expected, repairs):
    assert call("category", value, default) == (expected, repairs)


def test_category_aliases():
    assert set(CATEGORY_ALIASES.values()) <= set(CATEGORIES)
    assert not set(CATEGORY_ALIASES) & set(CATEGORIES)
    for alias, word in CATEGORY_ALIASES.items():
        assert call("category", alias.upper(), "") == (word, {"category_alias": 1})


@pytest.mark.parametrize(
    ("value", "expected", "repairs"),
    [
        *((status, status, {}) for status in BASELINE_STATUSES),
        (" NEW", "new", {}),
        (None, "unknown", {}),
        ("", "unknown", {}),
        ("fresh", "unknown", {"unknown_baseline": 1}),
        (["new"], "unknown", {"unknown_baseline": 1}),
    ],
)
def test_baseline(value, expected, repairs):
    assert call("baseline", value) == (expected, repairs)


@pytest.mark.parametrize(
    ("record", "expected", "repairs"),
    [
        ({"metadata": {"a": 1}}, {"a": 1}, {}),
        ({}, {}, {"null_metadata": 1}),
        ({"metadata": None}, {}, {"null_metadata": 1}),
        ({"metadata": ""}, {}, {}),
        ({"metadata": '{"a": [1]}'}, {"a": [1]}, {"metadata_from_string": 1}),
        ({"metadata": "[1]"}, {"value": "[1]"}, {"metadata_wrapped": 1}),
        ({"metadata": "text"}, {"value": "text"}, {"metadata_wrapped": 1}),
        ({"metadata": [1]}, {"value": [1]}, {"metadata_wrapped": 1}),
        ({"metadata": 0}, {"value": 0}, {"metadata_wrapped": 1}),
    ],
)
def test_metadata(record, expected, repairs):
    assert call("metadata", record) == (expected, repairs)


@pytest.mark.parametrize(
    ("value", "expected", "repairs"),
    [
        (dict.fromkeys(SUBSCORES, 0.5), dict.fromkeys(SUBSCORES, 0.5), {}),
        ({"impact": 0, "exposure": 1.0}, {"impact": 0.0, "exposure": 1.0}, {}),
        ({"impact": None, "other": 0.5}, {}, {}),
        ({"impact": "0.5", "anomaly": "x"}, {"impact": 0.5}, {"number_from_string": 1, "unreadable_number": 1}),
        ({"impact": 7, "anomaly": -1.0}, {"impact": 1.0, "anomaly": 0.0}, {"subscore_clamped": 2}),
        ([0.5], {}, {"unreadable_number": 1}),
        ("text", {}, {"unreadable_number": 1}),
    ],
)
def test_subscores(value, expected, repairs):
    assert call("subscores", value) == (expected, repairs)


@pytest.mark.parametrize(
    ("value", "expected", "repairs"),
    [
        (0.0, 0.0, {}),
        (1, 1.0, {}),
        (None, None, {}),
        ("0.25", 0.25, {"number_from_string": 1}),
        (1.0001, 1.0, {"subscore_clamped": 1}),
        (-3, 0.0, {"subscore_clamped": 1}),
        ("x", None, {"unreadable_number": 1}),
    ],
)
def test_fraction(value, expected, repairs):
    assert call("fraction", value, "impact") == (expected, repairs)


def test_a_fraction_that_is_not_finite_is_invalid():
    assert reason("fraction", math.inf, "impact") == "non_finite"
    assert reason("subscores", {"impact": math.nan}) == "non_finite"


@pytest.mark.parametrize(
    ("score", "expected", "count"), [(0.0, 0.0, 0), (100.0, 100.0, 0), (100.5, 100.0, 1), (-0.5, 0.0, 1)]
)
def test_clamped_score(score, expected, count):
    assert call("clamped_score", score) == (expected, {"score_clamped": 1} if count else {})


@pytest.mark.parametrize(
    ("value", "expected", "repairs"),
    [
        ("because, really", ["because, really"], {}),
        (["one", "two"], ["one", "two"], {}),
        (["one", 2], ["one", "2"], {"text_from_number": 1}),
        ({"why": 1}, [], {"rationale_dropped": 1}),
        (3, [], {"rationale_dropped": 1}),
    ],
)
def test_rationale(value, expected, repairs):
    assert call("rationale", value) == (expected, repairs)


@pytest.mark.parametrize(
    ("value", "expected", "repairs"),
    [
        (
            {"mitigation_steps": ["chmod u-s", " "], "attack_vectors": "local", "business_impact": "root", "other": 1},
            {"mitigation_steps": ["chmod u-s"], "attack_vectors": ["local"], "business_impact": "root"},
            {},
        ),
        ({"compliance_impact": ["PCI", 3], "technical_details": " "}, {"compliance_impact": ["PCI", "3"]},
         {"text_from_number": 1}),
        ({"mitigation_steps": [], "attack_vectors": {}, "business_impact": 4}, {}, {}),
        ({"error": "timeout", "mitigation_steps": ["x"]}, {}, {}),
        ({"fallback": True, "mitigation_steps": ["x"]}, {}, {}),
        ({"fallback": False, "mitigation_steps": ["x"]}, {"mitigation_steps": ["x"]}, {}),
        ("text", {}, {}),
    ],
)  # fmt: skip
def test_enrichment(value, expected, repairs):
    assert call("enrichment", value) == (expected, repairs)


def test_identity():
    assert call("identity", 17, "finding", "x") == ("17", {"text_from_number": 1})
    assert call("identity", 2.5, "finding", "x") == ("2.5", {"text_from_number": 1})
    built, repairs = call("identity", None, "finding", ("t", {"b": 1, "a": 10**40}))
    assert repairs == {"id_from_content": 1}
    assert built.startswith("finding_") and len(built) == len("finding_") + 16
    for value in ("", True, [], {}):
        assert call("identity", value, "finding", ("t", {"a": 10**40, "b": 1}))[0] == built  # the order is no content
    assert call("identity", None, "correlation", ("t", {"b": 1, "a": 10**40}))[0] == built.replace(
        "finding", "correlation"
    )
    assert call("identity", None, "finding", ("t", {"b": 2, "a": 10**40}))[0] != built


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(ANY)
def test_any_value_gives_the_right_type_or_is_invalid(value):
    cases = [
        ("number", (value, "x"), float | None),
        ("fraction", (value, "x"), float | None),
        ("strings", (value, "x"), list),
        ("plain_text", (value, "x"), str),
        ("severity_word", (value,), str | None),
        ("category", (value, ""), str),
        ("baseline", (value,), str),
        ("metadata", ({"metadata": value},), dict),
        ("subscores", (value,), dict),
        ("rationale", (value,), list),
        ("enrichment", (value,), dict),
        ("identity", (value, "x", value), str),
    ]
    for function, arguments, kind in cases:
        try:
            result, repairs = call(function, *arguments)
        except InvalidRecord as error:
            assert error.reason == "non_finite" and function in ("number", "fraction", "subscores")
            continue
        assert isinstance(result, kind), function
        assert all(count > 0 for count in repairs.values())
