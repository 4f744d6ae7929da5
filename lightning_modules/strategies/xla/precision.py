"""The precision plugin for XLA devices: tensors are stored and computed in their own dtype."""

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
    """Converts weights to one dtype, which is also the default dtype while the model is built.

    Lightning's ``precision: bf16-true`` on XLA only sets ``XLA_USE_BF16``: tensors still report float32, and the loss
    is rounded too. :class:`lightning_modules.CausalLMModule` sets its own dtypes (``backbone.dtype``) and accepts
    32-true only; bf16-true is for other modules.

    Args:
        precision: ``bf16-true``, or ``32-true``, which leaves the types of a module's weights as they are.
    """

    def __init__(self, precision: Literal["bf16-true", "32-true"] = "32-true") -> None:
        self.precision = precision
        self._desired_dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Converts weights to bfloat16 with bf16-true; with 32-true, as in Lightning, they are unchanged."""
        return module.to(dtype=self._desired_dtype) if self.precision == "bf16-true" else module

    @contextmanager
    def tensor_init_context(self) -> Generator[None, None, None]:
        """Sets the default dtype of new floating-point tensors."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(self._desired_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Steps as on any device: SPMD has summed gradients over all devices, and the strategy runs the graph."""
        return Precision.optimizer_step(self, optimizer, model, closure, **kwargs)

    def teardown(self) -> None:
        """Does nothing: no environment variable was set."""
