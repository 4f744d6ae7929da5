"""Severity and calibration metrics against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, confusion_matrix, f1_score

from datamodules.records import SEVERITIES
from lightning_modules.evaluation.classification_metrics import INVALID, Calibration, f1_scores, severity_classes
from lightning_modules.evaluation.metrics import AnswerMetrics
from tests.helpers.answers import RISK, answer, parsed, random_answers, results


def test_severity_equals_scikit_learn():
    items = list(random_answers(200))
    true = [item.expected["severity"] for item in items]
    answered = [(item.answer or {}).get("severity", "none") for item in items]
    answered = [value if value in SEVERITIES else "none" for value in answered]
    metrics = AnswerMetrics(RISK)
    metrics.update(items)
    got = metrics.results()
    assert got["severity_accuracy"] == pytest.approx(accuracy_score(true, answered))
    occurring = list(SEVERITIES[:4])  # "critical" is answered, but never expected
    assert got["severity_macro_f1"] == pytest.approx(f1_score(true, answered, labels=occurring, average="macro"))
    f1 = f1_score(true, answered, labels=occurring, average=None)
    assert [got[f"severity_f1_{name}"] for name in occurring] == pytest.approx(f1)
    expected = confusion_matrix(true, answered, labels=[*SEVERITIES, "none"])[:5]
    assert metrics.confusion() == expected.tolist()


def test_calibration_equals_scikit_learn_on_hard_outcomes():
    rng = np.random.default_rng(0)
    outcomes, answered = rng.integers(0, 2, 300), np.append(rng.random(299), 1.0)
    items = [parsed(answer(probability=int(q)), answer(probability=float(p))) for q, p in zip(outcomes, answered)]  # noqa: B905
    got = results([*items, parsed(answer(), answer(probability=7))])  # out of range: not counted
    assert got["actionable_brier"] == pytest.approx(brier_score_loss(outcomes, answered))
    bins = np.minimum((answered * 10).astype(int), 9)
    gaps = [abs(answered[bins == b].mean() - outcomes[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    assert got["actionable_ece"] == pytest.approx(sum(gaps))


def test_brier_of_probabilities_is_the_expectation_over_outcomes():
    q, p = [0.2, 0.7, 1.0], [0.1, 0.9, 0.4]
    got = results([parsed(answer(probability=a), answer(probability=b)) for a, b in zip(q, p, strict=True)])
    both = brier_score_loss([1, 1, 1, 0, 0, 0], p + p, sample_weight=q + [1 - x for x in q])
    assert got["actionable_brier"] == pytest.approx(both)
    assert got["actionable_ece"] == pytest.approx((0.1 + 0.2 + 0.6) / 3)
    assert got["actionable_error"] == pytest.approx((0.1 + 0.2 + 0.6) / 3)


def test_reliability_by_hand():
    metric = Calibration()
    pairs = [(0.05, 0.0), (0.09, 0.2), (1.0, 0.9), (0.95, 0.7)]  # 1.0 is in the last bin
    metric.update([parsed(answer(probability=q), answer(probability=p)) for p, q in pairs])
    assert metric.reliability() == [pytest.approx((2, 0.07, 0.1)), pytest.approx((2, 0.975, 0.8))]


def test_classes_of_missing_and_unknown_severities():
    assert severity_classes(parsed(answer("low"), answer("high"))) == (
        SEVERITIES.index("low"),
        SEVERITIES.index("high"),
    )
    assert severity_classes(parsed(answer("low"), answer("severe")))[1] == INVALID
    assert severity_classes(parsed({"a": 1}, "nonsense")) == (INVALID, INVALID)


def test_f1_of_a_class_that_does_not_occur_is_zero():
    confusion = torch.tensor([[3.0, 1, 0], [0, 0, 0]])  # two classes and a column for no class
    assert f1_scores(confusion).tolist() == pytest.approx([2 * 3 / (4 + 3), 0])
    assert torch.equal(f1_scores(confusion[None].expand(4, -1, -1)), f1_scores(confusion).expand(4, -1))
