"""Base class of metrics over parsed answers: each is a function of a few sums that add up over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.evaluation.answer_parsing import ParsedAnswer


class AnswerMetric(Metric):
    """A metric that is a function of sums over answers.

    Subclasses define the names of their sums in ``sums``, and in :meth:`count` what one answer adds to each.
    """

    sums: ClassVar[tuple[str, ...]] = ()
    full_state_update = False
    is_differentiable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.sums:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, answers: Sequence[ParsedAnswer]) -> None:
        """Adds answers to the sums."""
        for item in answers:
            for name, value in self.count(item).items():
                setattr(self, name, self.total(name) + value)

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """Returns what one answer adds to each sum; a sum that is left out stays the same."""
        raise NotImplementedError

    def total(self, name: str) -> Tensor:
        """Returns a sum."""
        value: Tensor = getattr(self, name)
        return value

    def ratio(self, part: str, whole: str) -> Tensor:
        """Returns the quotient of two sums; NaN if the second is 0."""
        return ratio(self.total(part), self.total(whole))


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Returns the quotient of two sums; NaN if the second is 0."""
    return part / whole if whole > 0 else torch.full_like(part, torch.nan)
