"""The interface between a strategy and the parts of the model.

Shapes in names: N positions of the flattened rows.

The training module has no branch on hardware. It asks the ``backend`` of its strategy where weights are built, which
positions reach the head, and how tensors are split. A strategy without a backend gets :class:`Backend`, plain
PyTorch; :mod:`lightning_modules.strategies` has one for XLA and one for sharded weights (FSDP2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datamodules.batch import IGNORE_INDEX
from datamodules.errors import UserError

if TYPE_CHECKING:
    from datamodules.batch import Batch
    from lightning_modules.models.backbone import Backbone


class Backend:
    """The default backend: plain PyTorch on one device, or on each rank of DDP.

    Attributes:
        fused_unsupported_reason: why the fused kernels can't run; None if they can.
    """

    fused_unsupported_reason: str | None = None

    def check(self, quantization: str, teacher: bool = False) -> None:
        """Validates settings before anything is loaded.

        Args:
            quantization: of a backbone.
            teacher: whether a teacher predicts in addition to the model that is trained.

        Raises:
            UserError: this backend does not support them; the message names what it supports.
        """

    def build_device(self, device: torch.device) -> torch.device:
        """Returns the device on which weights are loaded.

        Args:
            device: the device on which they will be trained.
        """
        return device

    def build(self, backbone: Backbone, device: torch.device) -> Any:
        """Loads the model that is trained; see :meth:`lightning_modules.models.backbone.Backbone.build`."""
        return backbone.build(self.build_device(device))

    def place(self, model: nn.Module) -> None:
        """Places a model that the strategy does not know, such as a teacher, on the devices."""

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors to the host; every rank must call it."""
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def generation_model(self, model: nn.Module) -> nn.Module:
        """Returns the model, or a copy of it, that generates answers."""
        return model

    def uneven_forward_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Returns a context in which ranks may call the model different numbers of times; every rank enters it."""
        return nullcontext()

    def positions(self, batch: Batch) -> Tensor | None:
        """Returns the indices [N] of the positions whose hidden states the objective gets; None for all positions."""
        return supervised_positions(batch)

    def split(self, tensor_N: Tensor, size: int) -> Sequence[Tensor]:
        """Splits the first axis into chunks whose logits are computed one chunk at a time."""
        return torch.split(tensor_N, size)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Reverses :meth:`split`."""
        return torch.cat(list(pieces))

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Computes the norm of all gradients together, on the device."""
        return torch.nn.utils.get_total_norm(gradients)

    def local_shards(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns this rank's shards of tensors; in-place changes of a shard change the tensor."""
        return list(tensors)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function whose intermediate results are recomputed in the backward pass instead of being kept."""
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


DEFAULT_BACKEND = Backend()


class SupportsBackend(Protocol):
    """A strategy with a backend of its own."""

    @property
    def backend(self) -> Backend:
        """The backend; a strategy may have it only after its processes have started."""
        ...


def supports_backend(strategy: object) -> TypeGuard[SupportsBackend]:
    """Checks whether a strategy has a backend, without creating it: only the class is inspected."""
    return hasattr(type(strategy), "backend")


def backend_of(trainer: Any) -> Backend:
    """Returns the backend of a trainer's strategy; the default one without a trainer or without a backend."""
    strategy = getattr(trainer, "strategy", None)
    return strategy.backend if supports_backend(strategy) else DEFAULT_BACKEND


def check_precision(plugin: Any, dtype: str) -> None:
    """Refuses a precision plugin that would change the types that the backbone sets.

    ``backbone.dtype`` and ``backbone.lora.dtype`` are the types of weights and products. Lightning's plugins would
    round float32 adapters (``bf16-true``), or run all layers under autocast (``bf16-mixed``).

    Args:
        plugin: of the trainer.
        dtype: of the backbone, for the message.

    Raises:
        UserError: the precision is not 32-true.
    """
    precision = plugin.precision
    if isinstance(plugin, BitsandbytesPrecision):
        raise UserError(
            "trainer.plugins=BitsandbytesPrecision: model.init_args.backbone.quantization quantises the base. "
            "Fix: remove the plugin and set backbone.quantization to nf4 or int8"
        )
    if precision != "32-true":
        raise UserError(
            f"trainer.precision={precision}: the types of weights and products are those of "
            f"model.init_args.backbone.dtype ({dtype}) and backbone.lora.dtype. Fix: set trainer.precision to 32-true, "
            "which converts nothing, and backbone.dtype to bfloat16 for products in bfloat16"
        )


def check_sharding(strategy: object, quantization: str) -> None:
    """Refuses strategies that can't shard the base, or whose checkpoints would hold it.

    Raises:
        UserError: it is one of them; the message names what to set.
    """
    if not isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        return
    name = type(strategy).__name__
    if quantization != "none":
        raise UserError(
            f"trainer.strategy {name} with backbone.quantization {quantization}: it can't shard bitsandbytes' weights "
            "(Lightning's issue 20855); set trainer.strategy ddp, which keeps the 4-bit base whole on every GPU, or "
            "backbone.quantization none"
        )
    if not supports_backend(strategy):
        raise UserError(
            f"trainer.strategy {name}: set it to lightning_modules.strategies.FSDP2Strategy, which shards a bf16 base "
            "over GPUs and keeps it out of checkpoints, or to ddp"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Checks whether a tensor is sharded over ranks (FSDP2's DTensor) and gathered only while its module computes."""
    return hasattr(tensor, "to_local")


def gather_positions(tensor_N: Tensor, positions_N: Tensor | None) -> Tensor:
    """Returns the entries of the first axis at the given positions; all of them for None."""
    return tensor_N if positions_N is None else tensor_N.index_select(0, positions_N)


def supervised_positions(batch: Batch, multiple: int = 1) -> Tensor:
    """Returns the indices [N] into the flattened rows of the positions that have a label, in order.

    The count comes from the host (``batch.supervised``), so nothing waits for the device. It is computed here for a
    batch without it.

    Args:
        batch: labelled rows.
        multiple: N is rounded up to a multiple of it with positions that have no label and so add nothing.
    """
    unlabelled = (batch.labels_BT == IGNORE_INDEX).flatten()
    count = batch.supervised or int((~unlabelled).sum())
    count = min(-(-count // multiple) * multiple, len(unlabelled))
    return torch.argsort(unlabelled, stable=True)[:count]
