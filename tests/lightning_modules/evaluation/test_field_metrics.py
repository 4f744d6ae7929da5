"""Validity, numbers and sets of strings: metrics by hand and against scikit-learn."""

import json
import math
from types import SimpleNamespace

import pytest
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from tests.helpers.answers import answer, parsed, random_answers, results


def test_validity_counts_each_property_separately():
    good = answer()
    items = [
        parsed(good, good),
        parsed(good, f"Sure: {json.dumps(good)}"),  # the agent could read it
        parsed(good, good | {"severity": "severe"}),  # JSON with the right keys that does not conform to the schema
        parsed(good, {"severity": "low"}),
        parsed(good, json.dumps(good)[:20], complete=False),
    ]
    got = results(items)
    assert got["answers"] == 5
    shares = [got[name] for name in ("json", "json_cut", "schema_valid", "exact_keys", "complete")]
    assert shares == [3 / 5, 4 / 5, 1 / 5, 2 / 5, 4 / 5]


def test_numbers_are_compared_if_both_answers_have_them():
    items = [
        parsed(answer(risk=30), answer(risk=40)),
        parsed(answer(risk=30), answer(risk="70")),  # a string is no number
        parsed(answer(risk=30), answer(risk=True)),
        parsed(answer(risk=30), "nonsense"),
        parsed(answer(risk=30), answer(risk=10, risk_subscores={"impact": 0.9, "exposure": None})),
    ]
    got = results(items)
    assert got["risk_error"] == pytest.approx(15)
    assert got["risk_answered"] == pytest.approx(2 / 5)
    assert got["subscore_error"] == pytest.approx(0.4 / 7)  # three untouched answers of two, one of one
    assert got["subscore_answered"] == pytest.approx(7 / 10)


def test_nothing_measured_is_nan_not_zero():
    got = results([parsed(answer(), "nonsense")])
    assert math.isnan(got["risk_error"])
    assert math.isnan(got["actionable_brier"])
    assert got["severity_accuracy"] == 0


def test_tags_by_hand():
    items = [
        parsed(answer(tags=("a", "b")), answer(tags=("b", "c", "c"))),
        parsed(answer(tags=()), answer(tags=())),
        parsed(answer(tags=("a",)), "nonsense"),
    ]
    got = results(items)
    assert got["tags_f1"] == pytest.approx(2 * 1 / (2 + 3))
    assert got["tags_exact"] == pytest.approx(1 / 3)


def test_tags_equal_scikit_learns_micro_average():
    items = list(random_answers(80))
    true = [item.expected["tags"] for item in items]
    answered = [(item.answer or {}).get("tags", []) for item in items]
    binary = MultiLabelBinarizer(classes=list("abcdef"))
    expected = f1_score(binary.fit_transform(true), binary.transform(answered), average="micro")
    assert results(items)["tags_f1"] == pytest.approx(expected)


def test_remediation_overlap_is_word_for_word():
    task = SimpleNamespace(name="remediation", answer_schema={"properties": {"actions": {"type": "array"}}})
    expected = {"actions": [{"title": "Stop it", "command": "kill 12", "check": "ps 12"}, {"title": "Look"}]}
    answered = {"actions": [{"title": "Stop it", "command": "kill -9 12", "check": "ps 12"}, "no object"]}
    got = results([parsed(expected, answered, task), parsed(expected, {"actions": None}, task)], task)
    assert got["commands_f1"] == pytest.approx(2 * 1 / (4 + 2))
    assert got["steps_f1"] == pytest.approx(2 * 1 / (4 + 1))
    assert "faithful" not in got
