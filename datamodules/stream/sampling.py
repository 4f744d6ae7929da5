"""How often each example of a block is used: task mixture and balance. Both are functions of the seed alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_COPIES = 16  #: of one example in one block: balance must not make a model learn three rare findings by heart

_U64 = np.uint64


def uniform(keys: NDArray[np.uint64], *seeds: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that depend on key and seeds only: the finaliser of SplitMix64.

    Args:
        keys: uint64 [N].
        seeds: each another stream.

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
    keys: NDArray[np.uint64], shares: NDArray[np.float64], *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Copies of each example by its task's share: 0.3 keeps three of ten, another three in the next epoch; 1.5 repeats.

    Args:
        keys: uint64 [N], of the examples.
        shares: float64 [N], of each example's task, >= 0.
        seed: of the run.
        epoch: from 0.

    Returns:
        int64 [N].
    """
    whole = np.floor(shares)
    copies: NDArray[np.int64] = (whole + (uniform(keys, seed, epoch) < shares - whole)).astype(np.int64)
    return copies


def balance_copies(strata: NDArray[np.int64], strength: float, start: float) -> NDArray[np.int64]:
    """Copies of each example that bring the strata nearer to equal size, their sum staying about N.

    An example of a stratum of n among C strata of N examples has the weight (1 - s) + s N / (C n), at most
    :data:`MAX_COPIES`; systematic sampling (Madow 1949) turns weights into whole copies, each off by less than one.

    Args:
        strata: int [N], codes.
        strength: s in 0..1; 0 leaves every example once.
        start: in [0, 1), the random start of the sampling.

    Returns:
        int64 [N].
    """
    if strength == 0 or len(strata) == 0:
        return np.ones(len(strata), np.int64)
    _, codes, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    weights = (1 - strength) + strength * len(strata) / (len(sizes) * sizes[codes])
    order = np.argsort(codes, kind="stable")  # stratum by stratum, so that each gets its share to within one copy
    ends = np.floor(np.cumsum(np.minimum(weights, MAX_COPIES)[order]) + start)
    copies = np.empty(len(strata), np.int64)
    copies[order] = np.diff(ends, prepend=0.0).astype(np.int64)
    return copies
