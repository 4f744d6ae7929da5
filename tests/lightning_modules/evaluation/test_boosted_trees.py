"""The tree finds a rule that no title tells, fills every key, and answers what it has not seen."""

import json
import random
import sys

import pytest

from datamodules.errors import UserError
from datamodules.tasks import RiskTask
from datamodules.tasks.base import Pair, compact_json
from lightning_modules.evaluation.baselines import TitleLookup, input_determined_categories
from lightning_modules.evaluation.boosted_trees import BoostedTrees, features_of
from lightning_modules.evaluation.evaluate import PredictionResult, score


def make_pairs(count, seed):
    """The severity follows from the port, the risk from the port and a word, the title from nothing."""
    rng = random.Random(seed)
    for _ in range(count):
        port, word = rng.randrange(1, 60000), rng.choice(["quiet", "loud"])
        severity = "high" if port > 30000 else "low"
        content = {"title": rng.choice("ab"), "category": "network", "metadata": {"port": str(port), "note": word}}
        answer = {
            "tags": ["x"],
            "severity": severity,
            "risk_score": (60 if severity == "high" else 20) + 9 * (word == "loud"),
        }
        answer |= {"risk_subscores": {"impact": 0.5, "anomaly": round(port / 60000, 2)}}
        yield Pair("risk", compact_json(content), compact_json(answer), severity, "network", 1)


def test_tree_learns_what_a_look_up_can_not():
    training, held_out = list(make_pairs(400, 0)), list(make_pairs(60, 1))
    figures = {}
    for kind in (TitleLookup, BoostedTrees):
        baseline = kind(training)
        figures[kind] = score(
            RiskTask(), held_out, [PredictionResult(baseline(pair.content)) for pair in held_out]
        ).figures
    tree, table = figures[BoostedTrees], figures[TitleLookup]
    assert tree["schema_valid"] == tree["exact_keys"] == 1
    assert tree["severity_accuracy"] > 0.95 > 0.7 > table["severity_accuracy"]
    assert tree["risk_error"] < 2 < table["risk_error"]
    assert tree["subscore_error"] < 0.03


def test_any_content_gets_an_answer():
    tree = BoostedTrees(list(make_pairs(60, 0)))
    for content in ("", "no json", "{}", '{"metadata":{"port":null,"x":[1,{"y":"' + "z" * 500 + '"}]}}'):
        assert json.loads(tree(content))["severity"] in ("low", "high")
    one = BoostedTrees(list(make_pairs(60, 0))[:1])  # a single class and value
    assert json.loads(one("{}"))["tags"] == ["x"]


def test_features_by_hand():
    finding = {"title": "Open port", "metadata": {"port": "22", "up": True, "list": ["a1", 2]}, "none": None}
    assert dict(features_of(finding)) == {
        "=title=open port": 1, "_open": 1, "_port": 1, "#metadata.port": 22, "=metadata.port=22": 1,
        "=metadata.up=true": 1, "_true": 1, "=metadata.list=a1": 1, "#metadata.list": 2, "=metadata.list=2": 1,
    }  # fmt: skip


def test_without_scikit_learn_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        BoostedTrees([])


def test_told_categories_are_those_where_like_findings_agree():
    def pairs(category, severities):
        return [Pair("risk", f'{{"n":{i}}}', "{}", s, category, 1) for i, s in enumerate(severities)]

    clear, torn = pairs("ioc", ["low"] * 12), pairs("mac", ["low"] * 6 + ["high"] * 6)
    assert input_determined_categories([*clear, *torn, *pairs("suid", ["low"] * 3)]) == {"ioc"}
    assert input_determined_categories([]) == set()
