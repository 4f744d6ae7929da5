"""Optimizers and learning-rate schedules; imports no other package of the project."""

from optimizers.lion import Lion
from optimizers.schedules import WarmupCosine, WarmupLinear

__all__ = ["Lion", "WarmupCosine", "WarmupLinear"]
