"""Optimizers and learning-rate schedules; imports nothing of ours."""

from optimizers.lion import Lion, decay_matrices_only
from optimizers.schedules import WarmupCosine, WarmupLinear

__all__ = ["Lion", "WarmupCosine", "WarmupLinear", "decay_matrices_only"]
