"""Warm-up and decay of the learning rate, in closed form.

A rate depends on (step, total_steps) only and has no state, so a resumed run continues with the rate of an
uninterrupted one::

    rate / peak    1 |      .---.._
                     |    /        ''-._          (cosine; a straight line in WarmupLinear)
       min_lr_ratio   |  /                ''-------
                   0 +-------------------------------> step
                        warm-up          total_steps
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class _Warmup(LambdaLR):
    """Linear warm-up, then ``_decay`` from 1 to 0 over the rest, rescaled to end at ``min_lr_ratio``."""

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_steps: int | float = 0.03, min_lr_ratio: float = 0.1
    ) -> None:
        warmup = _warmup_length(total_steps, warmup_steps)
        if not 0 <= min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio {min_lr_ratio} is not in [0, 1]; 0.1 ends at a tenth of the peak")
        decay = self._decay

        # A plain function: LambdaLR would save a callable object's attributes, and on resume silently replace the
        # schedule of the config by the checkpoint's.
        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
            return min_lr_ratio + (1 - min_lr_ratio) * decay(progress)

        super().__init__(optimizer, factor)

    _decay: Callable[[float], float]


class WarmupCosine(_Warmup):
    """Linear warm-up, then half a cosine to a fraction of the peak (Loshchilov and Hutter, arXiv 1608.03983, eq. 5).

    Args:
        optimizer: its groups' rates are the peaks.
        total_steps: optimizer steps of the whole run; the rate stays at its final value after them.
        warmup_steps: steps before the peak, or a fraction of ``total_steps`` if below 1. The first step has
            1 / (warmup_steps + 1) of the peak, not 0, since a step without effect would waste a batch. A run shorter
            than its warm-up (a trial of a few steps) ends before the peak.
        min_lr_ratio: rate at the end, as a fraction of the peak.

    Raises:
        ValueError: an argument out of range, or an unknown number of steps.
    """

    @staticmethod
    def _decay(progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class WarmupLinear(_Warmup):
    """Linear warm-up, then a straight line down to a fraction of the peak.

    Args:
        optimizer: its groups' rates are the peaks.
        total_steps: optimizer steps of the whole run; the rate stays at its final value after them.
        warmup_steps: steps before the peak, or a fraction of ``total_steps`` if below 1.
        min_lr_ratio: rate at the end, as a fraction of the peak.

    Raises:
        ValueError: an argument out of range, or an unknown number of steps.
    """

    @staticmethod
    def _decay(progress: float) -> float:
        return 1 - progress


def _warmup_length(total_steps: int, warmup_steps: int | float) -> int:
    """Returns the number of warm-up steps from a number or a fraction."""
    if not 1 <= total_steps < math.inf:
        raise ValueError(f"total_steps {total_steps} is not a number of steps; set trainer.max_steps")
    is_fraction = isinstance(warmup_steps, float) and warmup_steps < 1
    warmup = round(warmup_steps * total_steps) if is_fraction else warmup_steps
    if warmup != int(warmup) or warmup < 0:
        raise ValueError(
            f"warmup_steps {warmup_steps} is neither a fraction below 1 nor a number of steps; 0.03 is 3 % of any run"
        )
    return int(warmup)
