"""Majority class and title look-up by hand, and with the metrics that measure a model."""

import json

import pytest

from datamodules.records import Document, Finding
from datamodules.tasks import RiskTask
from datamodules.tasks.base import Pair
from lightning_modules.evaluation.answer_parsing import parse_answer
from lightning_modules.evaluation.baselines import MajorityClass, TitleLookup, input_determined_categories, typical
from lightning_modules.evaluation.metrics import AnswerMetrics

TASK = RiskTask()


def pair(title, severity, risk, category="network", **more):
    content = json.dumps({"title": title, "category": category, "metadata": {"port": risk}})
    return Pair("risk", content, json.dumps({"severity": severity, "risk_score": risk, **more}), severity, category, 1)


TRAIN = [
    pair("open port", "high", 80), pair("open port", "high", 90), pair("open port", "low", 20),
    pair("suid", "critical", 95, "suid"), pair("suid", "info", 5), pair("x", "info", 1), pair("y", "info", 2),
    pair("z", "info", 3),
]  # fmt: skip


def test_majority_class_and_lookup_by_hand():
    majority, lookup = MajorityClass(TRAIN), TitleLookup(TRAIN)
    assert json.loads(majority(TRAIN[0].content)) == {"severity": "info", "risk_score": 12.5}
    assert json.loads(lookup(pair("open port", "?", 0).content)) == {"severity": "high", "risk_score": 80}
    assert json.loads(lookup(pair("suid", "?", 0, "suid").content)) == {"severity": "critical", "risk_score": 95}
    assert json.loads(lookup(pair("suid", "?", 0).content)) == {"severity": "info", "risk_score": 5}
    assert lookup(pair("never seen", "?", 0).content) == majority("")
    assert lookup("no JSON") == majority("")
    assert lookup.seen == 6


def test_typical_answer_of_nested_values():
    answers = [
        {"risk_subscores": {"impact": 0.1, "exposure": 1}, "tags": ["a"]},
        {"risk_subscores": {"impact": 0.3}, "tags": ["b", "c"]},
        {"risk_subscores": {"impact": 0.2}, "tags": ["b", "c"], "probability_actionable": 0.5},
    ]
    assert json.loads(typical(answers)) == {
        "risk_subscores": {"impact": 0.2, "exposure": 1}, "tags": ["b", "c"], "probability_actionable": 0.5
    }  # fmt: skip


def test_answers_conform_to_the_schema_and_are_measured_as_those_of_a_model():
    findings = [
        Finding(str(i), f"title {i % 3}", "", "network", ("low", "high", "low")[i % 3], 30.0 + i, 30.0,
                tags=["t"], risk_subscores={"impact": 0.25}, probability_actionable=0.5)
        for i in range(30)
    ]  # fmt: skip
    pairs = list(TASK.pairs(Document("", "", 0, findings)))
    for baseline, accuracy in ((MajorityClass(pairs), 2 / 3), (TitleLookup(pairs), 1.0)):
        metrics = AnswerMetrics(TASK)
        metrics.update([parse_answer(TASK, pair, baseline(pair.content)) for pair in pairs])
        figures = metrics.results()
        assert figures["schema_valid"] == figures["exact_keys"] == 1
        assert figures["severity_accuracy"] == pytest.approx(accuracy)


def test_input_determined_categories_are_those_whose_equal_findings_agree():
    def pairs(category, severities):
        return [Pair("risk", f'{{"n":{i}}}', "{}", s, category, 1) for i, s in enumerate(severities)]

    agreeing, disagreeing = pairs("ioc", ["low"] * 12), pairs("mac", ["low"] * 6 + ["high"] * 6)
    assert input_determined_categories([*agreeing, *disagreeing, *pairs("suid", ["low"] * 3)]) == {"ioc"}
    assert input_determined_categories([]) == set()


def test_no_training_pairs():
    with pytest.raises(ValueError, match="training pairs"):
        MajorityClass([])
