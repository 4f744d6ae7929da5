"""Sums over supervised tokens: added up over batches, reduced over ranks, divided into means."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RunningSums:
    """Named sums that are added up over batches.

    Attributes:
        values: scalars on the device by name. ``count`` is the number of supervised tokens.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Adds the sums of one batch, without their graph."""
        for name, value in sums.items():
            self.values[name] = self.values[name] + value.detach() if name in self.values else value.detach()

    def clear(self) -> None:
        """Starts again at nothing."""
        self.values = {}

    def reduce(self, world_size: int) -> dict[str, Tensor]:
        """Returns the sums over all ranks and starts again at nothing.

        Every rank must call it, with the same names: it is one collective. Lightning's own reduction would put a
        barrier, and with it a wait for the device, before the collective.
        """
        sums, self.values = self.values, {}
        totals = torch.stack(list(sums.values()))
        if world_size > 1:
            torch.distributed.all_reduce(totals)
        return dict(zip(sums, totals.unbind(), strict=True))


def token_means(totals: Mapping[str, Tensor], stage: str) -> dict[str, Tensor]:
    """Divides sums by the number of supervised tokens.

    Args:
        totals: sums over all ranks, ``count`` among them.
        stage: prefix of the names that are returned (``train/loss``); ``correct`` becomes ``token_accuracy``.
    """
    names = {"correct": "token_accuracy"}
    count = totals["count"].clamp(min=1)
    return {f"{stage}/{names.get(name, name)}": total / count for name, total in totals.items() if name != "count"}
