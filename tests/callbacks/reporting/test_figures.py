"""Tests of the plots of an evaluation column."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt

from callbacks.reporting.figures import draw_figures
from datamodules.tasks import RiskTask, SummaryTask
from datamodules.tasks.base import compact_json
from lightning_modules.evaluation.evaluate import PredictionResult, score_predictions
from tests.helpers.tiny_evaluation import make_pair


def test_figures_show_the_measured_values():
    pairs = [replace(make_pair(i), category=f"c{i % 2}") for i in range(6)]
    answers = [compact_json(json.loads(p.completion) | {"probability_actionable": 0.3}) for p in pairs]
    pairs = [replace(p, completion=a) for p, a in zip(pairs, answers, strict=True)]
    drawn = draw_figures(score_predictions(RiskTask(), pairs, [PredictionResult(answer) for answer in answers]))
    assert list(drawn) == ["confusion", "calibration", "error_by_category"]
    assert [text.get_text() for text in drawn["confusion"].axes[0].texts] == ["2", "2", "2"]
    labels = [label.get_text() for label in drawn["error_by_category"].axes[0].get_yticklabels()]
    assert sorted(labels) == ["c0 (3)", "c1 (3)"]
    assert all(bar.get_width() == 0 for bar in drawn["error_by_category"].axes[0].patches)  # every answer is right
    dots = drawn["calibration"].axes[0].collections[0].get_offsets()
    assert dots.tolist() == [[0.3, 0.3]]


def test_a_task_without_severities_has_no_figures():
    one = score_predictions(RiskTask(), [make_pair(0)], [PredictionResult("")])
    assert draw_figures(one).keys() == {"confusion"}
    assert not draw_figures(score_predictions(SummaryTask(), [], []))


def test_figures_are_not_registered_with_pyplot():
    draw_figures(score_predictions(RiskTask(), [make_pair(0)], [PredictionResult("")]))
    assert plt.get_fignums() == []
