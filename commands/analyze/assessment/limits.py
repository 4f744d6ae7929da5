"""Known limits of a model: generated training data, weak categories, and titles that are unlike the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commands.model_source import TrainedModel


@dataclass(frozen=True)
class KnownLimits:
    """Known limits of a model."""

    def annotate(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds the limits to findings; returns those of the model."""
        return {}


def known_limits(trained: TrainedModel) -> KnownLimits:
    """Returns the known limits of a trained model."""
    return KnownLimits()
