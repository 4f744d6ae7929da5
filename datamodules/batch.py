"""The contract between data and model: a batch of rows.

Shapes in names: B rows, T tokens per row.

A row holds one or more examples. ``segment_ids_BT`` assigns each position to one of them: -1 padding, 0 the shared
prefix, 1..K the examples of the row. Position q may attend to position k if ``k <= q`` and (``seg[k] == seg[q]``, or
``seg[k] == 0`` and ``seg[q] > 0``). Positions restart in each example: at 0 in plain packing, at P (the prefix length)
after a shared prefix. Padding, packing and prefix sharing therefore follow one rule::

    tokens      BOS  inst  a1  a2  EOS  b1  b2  EOS  pad        (prefix of 2, examples a and b)
    segments     0    0    1   1   1    2   2   2    -1
    positions    0    1    2   3   4    2   3   4     0
    labels       .    .    a2  EOS  .   b2  EOS  .    .         (a1 and b1 end the prompts; "." is -100)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100  #: label of a position that is not supervised
PADDING = -1  #: segment id of padding
PREFIX = 0  #: segment id of the shared prefix


@dataclass  # not frozen: where another module trains with bf16-true, Lightning's plugin sets each field of a copy
class Batch:
    """Fixed-shape rows of token ids.

    Attributes:
        input_ids_BT: int64, tokens; 0 in padding.
        position_ids_BT: int64, rotary positions; 0 in padding.
        labels_BT: int64, already shifted: the label at position t is the token to predict there; -100 for none.
        segment_ids_BT: int64, see the module's docstring.
        findings: number of findings that the examples are about (for throughput; not a tensor, so that counting
            causes no transfer from the device).
        supervised: number of labels in the rows; 0 if the loader did not count them.
        padding: number of padding positions.
        extras: further tensors for an objective or a kernel, such as the targets of a cached teacher.
        plan: description of the segments for an attention kernel, computed on the host by the training module.
        cursor: position in the data at the end of this batch (:class:`datamodules.stream.resume.Cursor`). The data
            module reads it to record what was consumed; all other code passes it on unchanged.
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
        """Copies every tensor to a device. Lightning calls a method of this name on custom batch types."""
        moved = self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved if self.plan is None else replace(moved, plan=self.plan.to(device, non_blocking))

    def pin_memory(self) -> Batch:
        """Copies every tensor to page-locked memory, so that the transfer to a GPU overlaps with computation."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Applies a function to the four tensors and to those of ``extras``; the other fields are unchanged.

        Args:
            function: returns the replacement of a tensor.

        Returns:
            A new batch.
        """
        tensors: dict[str, Any] = {
            f.name: function(getattr(self, f.name)) for f in fields(self) if f.name.endswith("_BT")
        }
        extras = {k: function(v) for k, v in self.extras.items()} if self.extras is not None else None
        return replace(self, **tensors, extras=extras)
