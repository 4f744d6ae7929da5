"""Metrics of the severity class and of the calibration of ``probability_actionable``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.records import SEVERITIES
from lightning_modules.evaluation.answer_parsing import ParsedAnswer, as_number
from lightning_modules.evaluation.metric_base import ratio

INVALID = len(SEVERITIES)  #: column of the confusion matrix for answers without one of the severities
ECE_BINS = 10


class SeverityAgreement(Metric):
    """Accuracy and macro-F1 of ``severity``; an answer without one of the severities is wrong.

    Macro-F1 is the mean over the classes that occur among the expected answers, so that it can be 1 on a small sample.

    Attributes:
        confusion: [expected severity, answered severity or :data:`INVALID`], counts.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(
            "confusion", torch.zeros(len(SEVERITIES), INVALID + 1, dtype=torch.float64), dist_reduce_fx="sum"
        )

    def update(self, answers: Sequence[ParsedAnswer]) -> None:
        """Adds answers, except those whose expected answer has no severity."""
        for item in answers:
            expected, answered = severity_classes(item)
            if expected != INVALID:
                self.confusion[expected, answered] += 1

    def compute(self) -> dict[str, Tensor]:
        """Returns ``severity_accuracy``, ``severity_macro_f1``, and ``severity_f1_<class>`` of classes that occur."""
        right, total = self.confusion.diagonal(), self.confusion.sum()
        f1 = f1_scores(self.confusion)
        occurs = self.confusion.sum(1) > 0
        result = {
            "severity_accuracy": ratio(right.sum(), total),
            "severity_macro_f1": f1[occurs].mean() if occurs.any() else torch.full_like(total, torch.nan),
        }
        return result | {f"severity_f1_{name}": f1[i] for i, name in enumerate(SEVERITIES) if occurs[i]}


class Calibration(Metric):
    """Brier score and expected calibration error of ``probability_actionable``.

    The data has no outcomes, only the probability q that the finding is actionable. Both figures are expectations over
    an outcome drawn with probability q. The Brier score is q (1-p)^2 + (1-q) p^2, whose minimum is the mean of q (1-q).
    The calibration error is the distance between the means of p and q in each of ten bins of p. If every q is 0 or 1,
    they are the usual definitions.
    """

    full_state_update = False
    bins: Tensor
    brier: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("bins", torch.zeros(ECE_BINS, 3, dtype=torch.float64), dist_reduce_fx="sum")  # n, sum p, sum q
        self.add_state("brier", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, answers: Sequence[ParsedAnswer]) -> None:
        """Adds answers, except those without an answered probability in 0..1 or without an expected one."""
        for item in answers:
            q = as_number(item.expected.get("probability_actionable"))
            p = as_number((item.answer or {}).get("probability_actionable"))
            if q is None or p is None or not 0 <= p <= 1:
                continue
            self.brier += q * (1 - p) ** 2 + (1 - q) * p**2
            self.bins[min(int(p * ECE_BINS), ECE_BINS - 1)] += torch.tensor(
                [1.0, p, q], dtype=self.bins.dtype, device=self.bins.device
            )

    def reliability(self) -> list[tuple[float, float, float]]:
        """Returns for each bin with answers: their number, the mean answered and the mean expected probability."""
        return [(n, p / n, q / n) for n, p, q in self.bins.tolist() if n]

    def compute(self) -> dict[str, Tensor]:
        """Returns ``actionable_brier`` and ``actionable_ece``."""
        n = self.bins[:, 0].sum()
        gap = (self.bins[:, 1] - self.bins[:, 2]).abs().sum()
        return {"actionable_brier": ratio(self.brier, n), "actionable_ece": ratio(gap, n)}


def severity_classes(item: ParsedAnswer) -> tuple[int, int]:
    """Returns expected and answered severity as indices; :data:`INVALID` if there is none."""
    return _severity(item.expected), _severity(item.answer or {})


def f1_scores(confusion: Tensor) -> Tensor:
    """Computes the F1 of each class from counts [..., classes, classes + 1].

    It is 0 for a class that is neither expected nor answered.
    """
    classes = confusion.shape[-2]
    right = confusion[..., :classes].diagonal(dim1=-2, dim2=-1)
    total = confusion.sum(-1) + confusion[..., :classes].sum(-2)
    return 2 * right / total.clamp(min=1)


def _severity(answer: dict[str, Any]) -> int:
    value = answer.get("severity")
    return SEVERITIES.index(value) if value in SEVERITIES else INVALID
