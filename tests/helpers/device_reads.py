"""Counter of the reads of tensor values by the host."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountDeviceReads(TorchDispatchMode):
    """Counts ``.item()``, ``float()`` and ``bool()`` of tensors, each of which waits for an accelerator.

    Attributes:
        reads: number of reads inside the ``with`` block.
    """

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
