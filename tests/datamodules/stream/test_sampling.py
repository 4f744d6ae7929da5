"""Task mixture and balance: expectations, exact counts, determinism."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datamodules.stream.sampling import MAX_COPIES, balance_copies, mixture_copies, uniform

KEYS = np.arange(100_000, dtype=np.uint64)


def splitmix(value):
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32), st.integers(0, 100))
def test_uniform_is_splitmix_of_key_and_seeds(key, seed, epoch):
    expected = (splitmix(splitmix(key ^ seed) ^ epoch) >> 11) / 2**53
    assert uniform(np.array([key], np.uint64), seed, epoch)[0] == expected


def test_weights_are_kept_and_epochs_sample_independently():
    weights = np.full(len(KEYS), 0.3)
    first, second = (mixture_copies(KEYS, weights, seed=0, epoch=epoch) for epoch in (0, 1))
    assert set(first) == {0, 1}
    assert abs(first.mean() - 0.3) < 0.005
    assert abs((first & second).mean() - 0.09) < 0.005  # independent
    repeated = mixture_copies(KEYS, np.full(len(KEYS), 2.25), seed=0, epoch=0)
    assert set(repeated) == {2, 3}
    assert abs(repeated.mean() - 2.25) < 0.005
    assert (mixture_copies(KEYS, np.ones(len(KEYS)), seed=3, epoch=7) == 1).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=300), st.floats(0, 1), st.floats(0, 1, exclude_max=True))
def test_each_stratum_gets_its_weight_with_an_error_below_one_copy(strata, strength, start):
    strata = np.array(strata)
    copies = balance_copies(strata, strength, start)
    sizes = np.bincount(strata, minlength=5)
    weights = (1 - strength) + strength * len(strata) / ((sizes > 0).sum() * sizes[strata])
    weights = np.minimum(weights, MAX_COPIES)
    assert (np.abs(copies - weights) < 1 + 1e-6).all()
    for stratum in range(5):
        assert abs(copies[strata == stratum].sum() - weights[strata == stratum].sum()) <= 1 + 1e-6
    if strength == 0:
        assert (copies == 1).all()


def test_full_balance_makes_strata_equal():
    strata = np.array([0] * 900 + [1] * 90 + [2] * 10)
    copies = balance_copies(strata, 1.0, 0.5)
    assert all(abs(copies[strata == s].sum() - 1000 / 3) < 1 for s in (0, 1))
    assert copies[strata == 2].sum() == 10 * MAX_COPIES  # 33 copies of each would be memorised
