"""Parameter groups, the number of optimizer steps, and the normalisation of gradients before a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from datamodules.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_modules.models.backend import Backend


def trainable_parameters(model: nn.Module, quantization: str) -> list[nn.Parameter]:
    """Returns the parameters of a model that are trained.

    Args:
        model: the model.
        quantization: of its backbone, for the message.

    Raises:
        UserError: there are none.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError(
            f"backbone.lora=null: no weight is trainable with backbone.quantization={quantization}. "
            "Fix: set backbone.lora (rank 16, alpha 32)"
        )
    return trainable


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Divides parameters into matrices, which decay, and vectors (norm scales, DoRA magnitudes), which do not."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def total_steps(trainer: Trainer) -> int:
    """Returns the number of optimizer steps of a fit.

    Raises:
        UserError: the run has no end, as with streamed data and without ``trainer.max_steps``.
    """
    steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    if math.isinf(steps) or steps < 1:
        raise UserError(
            f"trainer.max_steps={trainer.max_steps}: the schedule needs the length of the run, and the data are "
            "streamed. Fix: set trainer.max_steps, or model.init_args.lr_scheduler to null"
        )
    return int(steps)


def normalize_gradients(
    gradients: Sequence[Tensor], scale: Tensor, backend: Backend, clip_val: float | None, algorithm: str | None
) -> Tensor:
    """Multiplies gradients in place by a factor and clips them.

    Clipping by norm takes one multiplication in total, by ``scale * min(1, clip_val / norm)``.
    ``torch.nn.utils.clip_grads_with_norm_`` would need a second pass over the gradients and would round differently.

    Args:
        gradients: of all trained parameters.
        scale: a scalar on the device.
        backend: of the strategy, which knows the norm of sharded gradients.
        clip_val: largest norm, or with ``algorithm="value"`` largest absolute value; None or 0 for no clipping.
        algorithm: norm, or value; None is norm.

    Returns:
        The norm of the multiplied gradients before clipping, on the device.
    """
    norm = backend.total_norm(gradients) * scale
    shards = backend.local_shards(gradients)
    by_value = algorithm == "value"
    if clip_val and not by_value:
        scale = scale * (clip_val / (norm + 1e-6)).clamp(max=1)
    # torch's own optimizers and clipping use these functions; there is no public form of one kernel over many tensors
    torch._foreach_mul_(shards, scale)
    if clip_val and by_value:
        torch._foreach_clamp_min_(shards, -clip_val)
        torch._foreach_clamp_max_(shards, clip_val)
    return norm
