"""Keeps DistributedDataParallel from broadcasting what every rank already has."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def exclude_frozen_from_ddp(module: nn.Module) -> None:
    """Excludes frozen parameters and all buffers of a module from DDP's broadcasts.

    Every rank loads the same base, so DDP need not broadcast gigabytes at the start. It also need not broadcast
    buffers before each forward pass, which would wait forever where ranks have unequal numbers of validation rows.

    DDP has no public way to do this. ``DDPStrategy(init_sync=False, broadcast_buffers=False)`` is not the same: it
    would also skip the broadcast of the trained parameters, so adapters that were drawn without a common seed would
    stay different on each rank, and it would not help with ``trainer.strategy: ddp``.
    """
    excluded = [
        *(name for name, parameter in module.named_parameters() if not parameter.requires_grad),
        *(name for name, _ in module.named_buffers()),
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, excluded)
