"""The metrics of a task: chosen by its schema, and equal on one rank and on two."""

from types import SimpleNamespace

import pytest

from datamodules.tasks import TASKS, build_tasks
from lightning_modules.evaluation.metrics import AnswerMetrics
from tests.helpers.answers import CORRELATION, RISK, random_answers


@pytest.mark.parametrize("task", [RISK, CORRELATION], ids=lambda task: task.name)
def test_two_ranks_equal_one(task):
    items = list(random_answers(31))
    one, ranks = AnswerMetrics(task), [AnswerMetrics(task), AnswerMetrics(task)]
    one.update(items)
    for rank, share in zip(ranks, (items[:7], items[7:]), strict=True):
        for start in range(0, len(share), 5):
            rank.update(share[start : start + 5])
    for name, metric in ranks[0].items():
        metric.merge_state(ranks[1][name])  # reduces as the process group would, by each state's dist_reduce_fx
    assert ranks[0].results() == pytest.approx(one.results(), nan_ok=True)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"severity"}, {"severity"}),
        ({"risk_score", "risk_subscores"}, {"risk", "subscores"}),
        ({"probability_actionable", "tags"}, {"actionable", "calibration", "tags"}),
        ({"top_findings"}, {"ids", "overlap", "faithfulness"}),
        ({"actions"}, {"commands", "steps", "overlap"}),
        (set(), set()),
    ],
)
def test_the_schema_decides_which_metrics_apply(keys, expected):
    task = SimpleNamespace(name="x", answer_schema={"properties": {key: {} for key in keys}})
    assert set(AnswerMetrics(task).keys()) == expected | {"validity"}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("name", TASKS)
def test_no_answers_are_no_figures(name):
    figures = AnswerMetrics(build_tasks(TASKS)[name]).results()
    assert figures.pop("answers") == 0
    assert figures
    assert all(value != value for value in figures.values())  # NaN
