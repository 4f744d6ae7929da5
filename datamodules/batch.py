"""The one contract between data and model.

Shapes in names: B rows, T tokens a row.

A row holds one or more examples, told apart by ``segment_ids_BT``: -1 padding, 0 the shared prefix, 1..K the row's
examples. Position q may attend to k where ``k <= q`` and (``seg[k] == seg[q]``, or ``seg[k] == 0`` and
``seg[q] > 0``). Positions restart in each example: at 0 in plain packing, at P (the prefix length) behind a shared
prefix. So padding, packing and prefix sharing are one rule::

    tokens      BOS  inst  a1  a2  EOS  b1  b2  EOS  pad        (prefix of 2, examples a and b)
    segments     0    0    1   1   1    2   2   2    -1
    positions    0    1    2   3   4    2   3   4     0
    labels       .    .    a2  EOS  .   b2  EOS  .    .         (a1, b1 end the prompts; "." is -100)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100  #: label of a position that is not supervised
PADDING = -1  #: segment id of padding
PREFIX = 0  #: segment id of the shared prefix


@dataclass  # not frozen: Lightning's half-precision plugins rebuild a dataclass field by field
class Batch:
    """Fixed-shape rows of token ids.

    Attributes:
        input_ids_BT: int64, tokens; 0 in padding.
        position_ids_BT: int64, rotary positions; 0 in padding.
        labels_BT: int64, already shifted: the label of position t is the token to predict there; -100 where none.
        segment_ids_BT: int64, see the module's docstring.
        findings: how many findings the rows' examples are about (for throughput; no tensor, so that counting costs
            no transfer).
        supervised: how many labels the rows hold.
        padding: how many positions are padding.
        extras: what an objective or a kernel wants beside it: cached teacher targets, host-built block masks.
        plan: what a model's attention kernel wants to know of the segments, made on the host by the module that trains.
        cursor: where in the data this batch ends (:class:`datamodules.stream.resume.Cursor`); the data module reads
            it to know what was consumed, everybody else passes it on.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    labels_BT: Tensor
    segment_ids_BT: Tensor
    findings: int = 0
    supervised: int = 0
    padding: int = 0
    extras: dict[str, Tensor] | None = None
    plan: Any = None
    cursor: object | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Copies every tensor to a device; the name is Lightning's protocol for custom batches."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved if self.plan is None else replace(moved, plan=self.plan.to(device, non_blocking))

    def pin_memory(self) -> Batch:
        """Copies every tensor to page-locked memory, so that the transfer to a GPU runs beside the computation."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Batch:
        names = [field.name for field in fields(self) if field.name.endswith("_BT")]
        extras = {k: function(v) for k, v in self.extras.items()} if self.extras is not None else None
        return replace(self, **{name: function(getattr(self, name)) for name in names}, extras=extras)
