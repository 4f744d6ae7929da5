"""Confidence intervals by hand, against the normal approximation, and around the figures they belong to."""

import math

import numpy as np
import pytest
import torch

from lightning_modules.evaluation.confidence_intervals import bootstrap, intervals, wilson
from tests.helpers.answers import random_answers, results


def test_intervals_contain_the_figures_and_are_reproducible():
    items = list(random_answers(60))
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
