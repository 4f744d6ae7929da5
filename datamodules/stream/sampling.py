"""Number of copies of each example of a block, for task mixture and balance. Both depend on the seed only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_COPIES = 16  #: of one example in one block: with more, a model would memorise the few findings of a rare stratum

_U64 = np.uint64


def uniform(keys: NDArray[np.uint64], *seeds: int) -> NDArray[np.float64]:
    """Returns numbers in [0, 1) that depend on key and seeds only, by the finaliser of SplitMix64.

    Args:
        keys: uint64 [N].
        seeds: each seed selects another stream.

    Returns:
        float64 [N].
    """
    value = keys.copy()
    for seed in seeds:
        value = _mix(value ^ _U64(seed & 0xFFFFFFFFFFFFFFFF))
    return (value >> _U64(11)).astype(np.float64) * 2.0**-53


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = value + _U64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _U64(27))) * _U64(0x94D049BB133111EB)
    return value ^ (value >> _U64(31))


def mixture_copies(
    keys: NDArray[np.uint64], weights: NDArray[np.float64], *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Returns the copies of each example by its task's weight.

    A weight of 0.3 keeps three of ten examples, and other ones in the next epoch; 1.5 repeats every second example.

    Args:
        keys: uint64 [N], keys of the examples.
        weights: float64 [N], weight of each example's task, >= 0.
        seed: seed of the run.
        epoch: from 0.

    Returns:
        int64 [N].
    """
    whole = np.floor(weights)
    copies: NDArray[np.int64] = (whole + (uniform(keys, seed, epoch) < weights - whole)).astype(np.int64)
    return copies


def balance_copies(strata: NDArray[np.int64], strength: float, start: float) -> NDArray[np.int64]:
    """Returns copies of each example that bring the strata nearer to equal size; their sum stays about N.

    An example of a stratum of n among C strata of N examples has the weight (1 - s) + s N / (C n), at most
    :data:`MAX_COPIES`. Systematic sampling (Madow 1949) turns weights into whole numbers of copies, each with an error
    below one.

    Args:
        strata: int [N], code of each example's stratum.
        strength: s in 0..1; 0 leaves every example once.
        start: random start of the systematic sampling, in [0, 1).

    Returns:
        int64 [N].
    """
    if strength == 0 or len(strata) == 0:
        return np.ones(len(strata), np.int64)
    _, codes, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    weights = (1 - strength) + strength * len(strata) / (len(sizes) * sizes[codes])
    order = np.argsort(codes, kind="stable")  # sorted by stratum: each one gets its share with an error below one copy
    ends = np.floor(np.cumsum(np.minimum(weights, MAX_COPIES)[order]) + start)
    copies = np.empty(len(strata), np.int64)
    copies[order] = np.diff(ends, prepend=0.0).astype(np.int64)
    return copies
