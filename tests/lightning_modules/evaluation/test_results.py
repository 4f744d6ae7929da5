"""Results of a task: the order of columns, the JSON format and back, and columns of an earlier file."""

import json
import math

import pytest

from datamodules.tasks import RiskTask
from datamodules.tasks.base import Pair, compact_json
from lightning_modules.evaluation.evaluate import PredictionResult
from lightning_modules.evaluation.results import TaskResults, finite, read_results, scores_of, write_results


def make_results(count=3):
    pairs = [
        Pair(
            "risk",
            compact_json({"title": f"é{i}"}),
            compact_json({"severity": "low", "risk_score": i}),
            "low",
            "network",
            1,
        )
        for i in range(count)
    ]
    return TaskResults(RiskTask(), "val", pairs, input_determined={"network", "ioc"})


def predictions(results, text=None, **options):
    return [PredictionResult(pair.completion if text is None else text, **options) for pair in results.pairs]


def test_models_come_first_the_untuned_one_before_all():
    results = make_results()
    results.add("baseline", predictions(results), baseline=True)
    results.add("tuned", predictions(results))
    results.add("untuned", predictions(results, "nonsense"))
    results.add("tuned", predictions(results, "{}"))
    assert list(results.columns) == ["untuned", "tuned", "baseline"]
    assert list(results.models) == ["untuned", "tuned"]
    assert results.baselines == ["baseline"]
    assert results.columns["tuned"].outcomes[0].text == "{}"  # replaced


def test_a_file_is_read_as_it_was_written(tmp_path):
    results = make_results()
    constrained = PredictionResult("{}")
    results.add("untuned", predictions(results, "nonsense", nll=2.5, tokens=4, constrained=constrained))
    results.add("look-up", predictions(results), baseline=True)  # its likelihood is NaN
    results.seconds["untuned"], results.about["untuned"] = 1.5, {"step": 3}
    file = tmp_path / "run" / "evaluation.json"
    write_results(file, [results], step=3)
    assert list(file.parent.iterdir()) == [file]  # no temporary file is left
    text = file.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "é1" in text
    assert json.loads(text)["step"] == 3
    record = read_results(file)["risk"]
    assert record["input_determined_categories"] == ["ioc", "network"]
    assert (record["n"], record["split"], record["digest"]) == (3, "val", results.digest)
    for heading, scores in results.columns.items():
        again = scores_of(record["columns"][heading])
        assert str(again.figures) == str(scores.figures)
        assert str(again.intervals) == str(scores.intervals)
        assert again.confusion == scores.confusion
        assert [(o.text, o.tokens) for o in again.outcomes] == [(o.text, o.tokens) for o in scores.outcomes]
    assert math.isnan(scores_of(record["columns"]["look-up"]).outcomes[0].nll)


def test_a_column_is_loaded_only_for_the_same_pairs():
    before = make_results()
    before.add("untuned", predictions(before, nll=1.0, tokens=2))
    before.seconds["untuned"] = 2.0
    record = json.loads(json.dumps(before.record()))
    same, other = make_results(), make_results(4)
    for results in (same, other):
        results.load_column(record, "untuned")
        results.load_column(record, "absent")
        results.load_column({}, "untuned")
    assert str(same.columns["untuned"].figures) == str(before.columns["untuned"].figures)
    assert same.seconds == {"untuned": 2.0}
    assert other.columns == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tasks": [1]}'])
def test_a_damaged_file_has_no_records(tmp_path, text):
    file = tmp_path / "evaluation.json"
    assert read_results(file) == {}
    file.write_text(text)
    assert read_results(file) == {}


def test_an_error_leaves_the_old_file(tmp_path):
    file, results = tmp_path / "evaluation.json", make_results()
    write_results(file, [results])
    before = file.read_bytes()
    with pytest.raises(TypeError):
        write_results(file, [results], step=object())
    assert file.read_bytes() == before


def test_finite_replaces_what_json_can_not_represent():
    value = {"a": [math.nan, 1.0, (math.inf, "x")], "b": {"c": -math.inf, "d": None, "e": 3}}
    assert finite(value) == {"a": [None, 1.0, [None, "x"]], "b": {"c": None, "d": None, "e": 3}}
