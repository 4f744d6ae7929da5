"""Precision on XLA devices: weights have the type they say."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.precision import XLAPrecision
from torch import nn


class TruePrecision(XLAPrecision):
    """Weights and floating-point inputs of one type; a module may keep types of its own.

    Lightning's ``precision: bf16-true`` on XLA only sets ``XLA_USE_BF16``: tensors go on saying float32, and the loss
    is rounded too. :class:`lightning_modules.CausalLMModule` keeps the types of its backbone (bf16 weights under
    float32 adapters), whatever is asked for here.

    Args:
        precision: ``bf16-true`` or ``32-true``.
    """

    def __init__(self, precision: Literal["bf16-true", "32-true"] = "32-true") -> None:
        self.precision = precision
        self._desired_dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Converts weights, unless the module refuses."""
        return module.to(dtype=self._desired_dtype)

    @contextmanager
    def tensor_init_context(self) -> Generator[None, None, None]:
        """Makes new floating-point tensors of the type."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(self._desired_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Steps as on any device: gradients are over all devices already (SPMD), and the strategy computes."""
        return Precision.optimizer_step(self, optimizer, model, closure, **kwargs)

    def teardown(self) -> None:
        """Nothing to undo."""
