"""Strategies, accelerators and precision plugins in addition to Lightning's, for use by class path."""

from lightning_modules.strategies.fsdp2 import FSDP2Strategy
from lightning_modules.strategies.fsdp2_backend import FSDP2Backend
from lightning_modules.strategies.xla.accelerator import PJRTAccelerator
from lightning_modules.strategies.xla.backend import XLABackend
from lightning_modules.strategies.xla.precision import TruePrecision
from lightning_modules.strategies.xla.spmd import XLASPMDStrategy

__all__ = ["FSDP2Backend", "FSDP2Strategy", "PJRTAccelerator", "TruePrecision", "XLABackend", "XLASPMDStrategy"]
