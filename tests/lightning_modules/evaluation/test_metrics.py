"""Metrics against hand-made cases, scikit-learn, and themselves on two ranks."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, confusion_matrix, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from datamodules.records import SEVERITIES
from datamodules.tasks.base import Pair
from lightning_modules.evaluation.answer_parsing import cut_out, parse, parse_answer
from lightning_modules.evaluation.confidence_intervals import bootstrap, intervals, wilson
from lightning_modules.evaluation.metrics import AnswerMetrics, Faithfulness

RISK = SimpleNamespace(
    name="risk",
    answer_schema={
        "type": "object",
        "required": ["severity", "risk_score", "risk_subscores", "probability_actionable", "tags"],
        "additionalProperties": False,
        "properties": {
            "severity": {"enum": list(SEVERITIES)},
            "risk_score": {"type": "number", "minimum": 0, "maximum": 100},
            "risk_subscores": {"type": "object"},
            "probability_actionable": {"type": "number", "minimum": 0, "maximum": 1},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
    },
)
CORRELATION = SimpleNamespace(
    name="correlation",
    answer_schema={
        "type": "object",
        "required": ["related_finding_ids"],
        "properties": {
            "related_finding_ids": {"type": "array", "items": {"type": "string"}},
            "why": {"type": "string"},
        },
    },
)


def answer(severity="low", risk=30.0, probability=0.5, tags=("a",), **more):
    subscores = {"impact": 0.5, "exposure": 0.1}
    value = {"severity": severity, "risk_score": risk, "risk_subscores": subscores}
    return value | {"probability_actionable": probability, "tags": list(tags)} | more


def judged(expected, text, task=RISK, content="{}", complete=True):
    pair = Pair(task.name, content, json.dumps(expected), expected.get("severity", ""), "network", 1)
    return parse_answer(task, pair, text if isinstance(text, str) else json.dumps(text), complete)


def results(items, task=RISK):
    metrics = AnswerMetrics(task)
    metrics.update(items)
    return metrics.results()


def test_parsing_is_strict_and_cutting_out_is_not():
    assert parse('{"a": 1}\n') == {"a": 1}
    for text in ("", "[1]", '{"a": 1} ok', "```json\n{}\n```", '{"a": NaN}', '{"a": 1', '"{}"', "\ud800"):
        assert parse(text) is None
    assert parse(cut_out('Sure! {"a": {"b": 2}} Bye')) == {"a": {"b": 2}}
    assert cut_out("no brace }") == ""


def test_validity_counts_each_property_by_itself():
    good = answer()
    items = [
        judged(good, good),
        judged(good, f"Sure: {json.dumps(good)}"),  # the agent could read it
        judged(good, good | {"severity": "severe"}),  # JSON with the right keys, but not of the schema
        judged(good, {"severity": "low"}),
        judged(good, json.dumps(good)[:20], complete=False),
    ]
    got = results(items)
    assert got["answers"] == 5
    shares = [got[name] for name in ("json", "json_cut", "schema_valid", "exact_keys", "complete")]
    assert shares == [3 / 5, 4 / 5, 1 / 5, 2 / 5, 4 / 5]


def random_items(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        expected = answer(rng.choice(SEVERITIES[:4]), rng.uniform(0, 100), rng.random(), rng.sample("abcdef", 3))
        said = answer(rng.choice(SEVERITIES), rng.uniform(0, 100), rng.random(), rng.sample("abcdef", 2))
        broken = ['{"severity": "low"', "", json.dumps(said | {"severity": ["low"], "risk_score": "70"})]
        yield judged(expected, rng.choice([json.dumps(said)] * 6 + broken))


def test_severity_equals_scikit_learn():
    items = list(random_items(200))
    true = [item.expected["severity"] for item in items]
    said = [(item.answer or {}).get("severity", "none") for item in items]
    said = [value if value in SEVERITIES else "none" for value in said]
    metrics = AnswerMetrics(RISK)
    metrics.update(items)
    got = metrics.results()
    assert got["severity_accuracy"] == pytest.approx(accuracy_score(true, said))
    occurring = list(SEVERITIES[:4])  # "critical" is answered, but never expected
    assert got["severity_macro_f1"] == pytest.approx(f1_score(true, said, labels=occurring, average="macro"))
    f1 = f1_score(true, said, labels=occurring, average=None)
    assert [got[f"severity_f1_{name}"] for name in occurring] == pytest.approx(f1)
    expected = confusion_matrix(true, said, labels=[*SEVERITIES, "none"])[:5]
    assert metrics.confusion() == expected.tolist()


def test_numbers_are_compared_where_there_are_numbers():
    items = [
        judged(answer(risk=30), answer(risk=40)),
        judged(answer(risk=30), answer(risk="70")),  # a string is no number
        judged(answer(risk=30), answer(risk=True)),
        judged(answer(risk=30), "nonsense"),
        judged(answer(risk=30), answer(risk=10, risk_subscores={"impact": 0.9, "exposure": None})),
    ]
    got = results(items)
    assert got["risk_error"] == pytest.approx(15)
    assert got["risk_answered"] == pytest.approx(2 / 5)
    assert got["subscore_error"] == pytest.approx(0.4 / 7)  # three untouched answers of two, one of one
    assert got["subscore_answered"] == pytest.approx(7 / 10)


def test_nothing_measured_is_nan_not_zero():
    got = results([judged(answer(), "nonsense")])
    assert math.isnan(got["risk_error"])
    assert math.isnan(got["actionable_brier"])
    assert got["severity_accuracy"] == 0


def test_calibration_equals_scikit_learn_on_hard_outcomes():
    rng = np.random.default_rng(0)
    outcomes, said = rng.integers(0, 2, 300), np.append(rng.random(299), 1.0)
    items = [judged(answer(probability=int(q)), answer(probability=float(p))) for q, p in zip(outcomes, said)]  # noqa: B905
    got = results([*items, judged(answer(), answer(probability=7))])  # out of range: not counted
    assert got["actionable_brier"] == pytest.approx(brier_score_loss(outcomes, said))
    bins = np.minimum((said * 10).astype(int), 9)
    gaps = [abs(said[bins == b].mean() - outcomes[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    assert got["actionable_ece"] == pytest.approx(sum(gaps))


def test_brier_of_probabilities_is_the_expectation_over_outcomes():
    q, p = [0.2, 0.7, 1.0], [0.1, 0.9, 0.4]
    got = results([judged(answer(probability=a), answer(probability=b)) for a, b in zip(q, p, strict=True)])
    both = brier_score_loss([1, 1, 1, 0, 0, 0], p + p, sample_weight=q + [1 - x for x in q])
    assert got["actionable_brier"] == pytest.approx(both)
    assert got["actionable_ece"] == pytest.approx((0.1 + 0.2 + 0.6) / 3)
    assert got["actionable_error"] == pytest.approx((0.1 + 0.2 + 0.6) / 3)


def test_tags_by_hand():
    items = [
        judged(answer(tags=("a", "b")), answer(tags=("b", "c", "c"))),
        judged(answer(tags=()), answer(tags=())),
        judged(answer(tags=("a",)), "nonsense"),
    ]
    got = results(items)
    assert got["tags_f1"] == pytest.approx(2 * 1 / (2 + 3))
    assert got["tags_exact"] == pytest.approx(1 / 3)


def test_tags_equal_scikit_learns_micro_average():
    items = list(random_items(80))
    true = [item.expected["tags"] for item in items]
    said = [(item.answer or {}).get("tags", []) for item in items]
    binary = MultiLabelBinarizer(classes=list("abcdef"))
    expected = f1_score(binary.fit_transform(true), binary.transform(said), average="micro")
    assert results(items)["tags_f1"] == pytest.approx(expected)


def test_correlation_ids_and_inventions_by_hand():
    content = json.dumps({"findings": [{"id": "f1", "port": 4444}, {"id": "f2"}, {"id": "f3"}]})
    expected = {"related_finding_ids": ["f1", "f2"], "why": "Both use port 4444; 2 in all."}
    said = {"related_finding_ids": ["f1", "f9"], "why": "Port 4444 and 5555, sha256."}
    items = [
        judged(expected, said, CORRELATION, content),
        judged(expected, expected, CORRELATION, content),
        judged(expected, "nonsense", CORRELATION, content),
    ]
    got = results(items, CORRELATION)
    assert "severity_accuracy" not in got
    assert got["ids_f1"] == pytest.approx(2 * 3 / (4 + 6))
    assert got["ids_invented"] == pytest.approx(1 / 4)
    assert got["numbers_invented"] == pytest.approx(1 / 4)  # of 4444, 5555; 4444, 2 (excused: expected says it)
    assert got["faithful"] == pytest.approx(1 / 3)


def test_ids_are_known_from_json_in_a_text_too():
    """A prompt of the agent's is a text with JSON in it."""
    content = 'Data [all]: {"findings":[{"id":"f1"}]}\n\nTies:\n[{"id":"c1"}]\n\nKeys {a}: [1'
    expected = {"related_finding_ids": ["f1"]}
    item = judged(expected, {"related_finding_ids": ["f1", "c1", "a"]}, CORRELATION, content)
    got = Faithfulness().count(item)
    assert (got["ids"], got["false_ids"]) == (3, 1)


SUMMARY = SimpleNamespace(name="summary", answer_schema={"properties": {"executive_summary": {"type": "string"}}})


@pytest.mark.parametrize(
    ("text", "ids", "false_ids", "false_numbers"),
    [
        ("2 findings: proc_12 is high.", 1, 0, 0),
        ("proc_13 reads /etc/shadow at 9.", 2, 2, 1),
        ("/tmp/x. Uses sha256 and/or IPv4, e.g. CVE-2024-1 on port 22.", 2, 1, 0),
        ("Nothing is named.", 0, 0, 0),
    ],
)
def test_every_number_and_name_of_a_summary_is_looked_for_in_its_input(text, ids, false_ids, false_numbers):
    content = json.dumps({"findings": [{"id": "proc_12", "title": "Writable /tmp/x", "port": 22}, {"id": "f2"}]})
    item = judged({"executive_summary": "2 findings."}, {"executive_summary": text}, SUMMARY, content)
    got = Faithfulness().count(item)
    assert (got["ids"], got["false_ids"], got["false_numbers"]) == (ids, false_ids, false_numbers)
    assert got["faithful"] is (false_ids + false_numbers == 0)


def test_remediation_overlap_is_word_for_word():
    task = SimpleNamespace(name="remediation", answer_schema={"properties": {"actions": {"type": "array"}}})
    expected = {"actions": [{"title": "Stop it", "command": "kill 12", "check": "ps 12"}, {"title": "Look"}]}
    said = {"actions": [{"title": "Stop it", "command": "kill -9 12", "check": "ps 12"}, "no object"]}
    got = results([judged(expected, said, task), judged(expected, {"actions": None}, task)], task)
    assert got["commands_f1"] == pytest.approx(2 * 1 / (4 + 2))
    assert got["steps_f1"] == pytest.approx(2 * 1 / (4 + 1))
    assert "faithful" not in got


def test_word_overlap_is_rouge_1():
    items = [judged({"why": "the port is open"}, {"why": "the open open door"}, CORRELATION)]
    assert results(items, CORRELATION)["word_overlap"] == pytest.approx(2 * 2 / 8)


@pytest.mark.parametrize("task", [RISK, CORRELATION], ids=lambda task: task.name)
def test_two_ranks_equal_one(task):
    items = list(random_items(31))
    one, ranks = AnswerMetrics(task), [AnswerMetrics(task), AnswerMetrics(task)]
    one.update(items)
    for rank, share in zip(ranks, (items[:7], items[7:]), strict=True):
        for start in range(0, len(share), 5):
            rank.update(share[start : start + 5])
    for name, metric in ranks[0].items():
        metric.merge_state(ranks[1][name])  # reduces as the process group would, by each state's dist_reduce_fx
    assert ranks[0].results() == pytest.approx(one.results(), nan_ok=True)


def test_intervals_hold_the_figures_and_are_reproducible():
    items = list(random_items(60))
    got, figures = intervals(items), results(items)
    assert set(got) == {"schema_valid", "exact_keys", "severity_accuracy", "severity_macro_f1", "risk_error"}
    for name, (low, high) in got.items():
        assert low < figures[name] < high
    assert got == intervals(items)
    assert math.isnan(intervals([])["schema_valid"][0])


def test_wilson_by_hand_and_bootstrap_of_a_mean():
    assert wilson(50, 50) == pytest.approx((0.9287, 1.0), abs=1e-4)  # n / (n + z^2)
    assert wilson(25, 50) == pytest.approx((0.3664, 0.6336), abs=1e-4)
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(lambda index: values[index].mean(1), 400)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    state = torch.get_rng_state()
    bootstrap(lambda index: values[index].mean(1), 400)
    assert torch.equal(torch.get_rng_state(), state)
