"""What Lightning lacks: strategies, accelerators and precision plugins, named by class path."""

from lightning_modules.strategies.accelerator import PJRTAccelerator
from lightning_modules.strategies.fsdp2 import FSDP2Strategy
from lightning_modules.strategies.fsdp2_backend import FSDP2Backend
from lightning_modules.strategies.precision import TruePrecision
from lightning_modules.strategies.spmd import XLASPMDStrategy
from lightning_modules.strategies.xla_backend import XLABackend

__all__ = ["FSDP2Backend", "FSDP2Strategy", "PJRTAccelerator", "TruePrecision", "XLABackend", "XLASPMDStrategy"]
