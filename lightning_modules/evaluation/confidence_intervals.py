"""95 % intervals of figures over a sample: with 50 answers, a share is uncertain by up to 14 points on either side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.records import SEVERITIES
from lightning_modules.evaluation.answer_parsing import ParsedAnswer, as_number
from lightning_modules.evaluation.classification_metrics import INVALID, f1_scores, severity_classes

_CELLS = len(SEVERITIES) * (INVALID + 1)  # number of cells of a confusion matrix


def intervals(answers: Sequence[ParsedAnswer], seed: int = 0) -> dict[str, tuple[float, float]]:
    """Computes 95 % intervals of the table's figures, by the names of ``AnswerMetrics``.

    Shares have Wilson's interval; macro-F1 and the mean error of the risk score have the bootstrap's.

    Args:
        answers: the parsed answers.
        seed: seed of the bootstrap.
    """
    n = len(answers)
    exact = sum(item.answer is not None and item.answer.keys() == item.expected.keys() for item in answers)
    result = {"schema_valid": wilson(sum(item.valid for item in answers), n), "exact_keys": wilson(exact, n)}
    classes_N2 = np.array([severity_classes(item) for item in answers], dtype=np.intp).reshape(n, 2)
    classes_N2 = classes_N2[classes_N2[:, 0] != INVALID]
    if len(classes_N2):
        result["severity_accuracy"] = wilson(int((classes_N2[:, 0] == classes_N2[:, 1]).sum()), len(classes_N2))
        result["severity_macro_f1"] = bootstrap(lambda index_RN: _macro_f1(classes_N2[index_RN]), len(classes_N2), seed)
    error_N = np.array([_risk_error(item) for item in answers], dtype=np.float64)
    error_N = error_N[~np.isnan(error_N)]
    if len(error_N):
        result["risk_error"] = bootstrap(lambda index_RN: error_N[index_RN].mean(1), len(error_N), seed)
    return result


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], NDArray[np.float64]], n: int, seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """Computes the percentile interval of a statistic over n answers (Efron 1979), with its own random generator.

    Args:
        statistic: takes indices [resamples, n] and returns the statistic of each resample.
        n: number of answers, at least 1.
        seed: seed of the resampling.
        resamples: number of resamples.
    """
    values = statistic(np.random.default_rng(seed).integers(n, size=(resamples, n)))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Computes the interval of a share (Wilson 1927, eq. 4).

    Unlike the bootstrap's interval, it has a width at 0 and at 1.

    Returns:
        The two bounds; NaN if n is 0.
    """
    if n == 0:
        return float("nan"), float("nan")
    z = 1.959964  # the normal distribution's 97.5 % point
    share, denominator = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / denominator
    half = z / denominator * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)  # exact at the ends


def _macro_f1(classes_RN2: NDArray[np.intp]) -> NDArray[np.float64]:
    """Computes the macro-F1 of each resample, over the classes that occur in it."""
    resamples = len(classes_RN2)
    cell_RN = classes_RN2[..., 0] * (INVALID + 1) + classes_RN2[..., 1] + _CELLS * np.arange(resamples)[:, None]
    counts = np.bincount(cell_RN.ravel(), minlength=resamples * _CELLS)
    confusion = torch.from_numpy(counts).double().view(resamples, len(SEVERITIES), INVALID + 1)
    occurs = confusion.sum(-1) > 0
    return ((f1_scores(confusion) * occurs).sum(-1) / occurs.sum(-1)).numpy()


def _risk_error(item: ParsedAnswer) -> float:
    expected, answered = (as_number(value.get("risk_score")) for value in (item.expected, item.answer or {}))
    return abs(expected - answered) if expected is not None and answered is not None else float("nan")
