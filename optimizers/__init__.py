"""Optimizers and learning-rate schedules; imports nothing of ours."""

from optimizers.lion import Lion
from optimizers.schedules import WarmupCosine, WarmupLinear

__all__ = ["Lion", "WarmupCosine", "WarmupLinear"]
