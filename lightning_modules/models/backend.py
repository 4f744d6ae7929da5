"""What a strategy may ask of the model's parts: where weights are built, which positions reach the head, how it is cut.

Shapes in names: N positions of the flattened rows.

The module that trains has no branch on hardware: it asks its strategy's ``backend``. Any strategy without one gets
:class:`Backend`, PyTorch as it is; :mod:`lightning_modules.strategies` has one for XLA and one for divided weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datamodules.batch import IGNORE_INDEX
from datamodules.errors import UserError

if TYPE_CHECKING:
    from datamodules.batch import Batch
    from lightning_modules.models.backbone import Backbone


class Backend:
    """PyTorch as it is.

    Attributes:
        fused_unsupported_reason: why the fast path can't run; None where it can.
    """

    fused_unsupported_reason: str | None = None

    def check(self, quantization: str, teacher: bool = False) -> None:
        """Refuses what this backend can't run, before anything is loaded.

        Args:
            quantization: of a backbone.
            teacher: whether a teacher predicts beside the model that is trained.

        Raises:
            UserError: it can't be run; says what can.
        """

    def build_device(self, device: torch.device) -> torch.device:
        """Where a model's weights are loaded; ``device`` is where they will be trained."""
        return device

    def build(self, recipe: Backbone, device: torch.device) -> Any:
        """Loads the model that is trained; see :meth:`lightning_modules.models.backbone.Backbone.build`."""
        return recipe.build(self.build_device(device))

    def place(self, model: nn.Module) -> None:
        """Takes care of a model that the strategy does not know of, such as a teacher."""

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors to the host; every rank calls it."""
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def generation_model(self, model: nn.Module) -> nn.Module:
        """The model where it can write answers: as it is."""
        return model

    def uneven_forward_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Within it ranks may call the model unequally often, each for answers of its own; every rank enters it."""
        return nullcontext()

    def positions(self, batch: Batch) -> Tensor | None:
        """Indices [N] of the positions whose hidden states the objective gets; None for all of them."""
        return supervised_positions(batch)

    def split(self, tensor_N: Tensor, size: int) -> Sequence[Tensor]:
        """Cuts the first axis into pieces of which one at a time has logits."""
        return torch.split(tensor_N, size)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Undoes :meth:`split`."""
        return torch.cat(list(pieces))

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients together, on the device."""
        return torch.nn.utils.get_total_norm(gradients)

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What this rank holds of tensors; a change of it is a change of them."""
        return list(tensors)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function; what it would save for the backward pass is made again there."""
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


DEFAULT_BACKEND = Backend()


def backend_of(trainer: Any) -> Backend:
    """The backend of a trainer's strategy; PyTorch as it is without a trainer."""
    backend: Backend = getattr(getattr(trainer, "strategy", None), "backend", DEFAULT_BACKEND)
    return backend


def check_sharding(strategy: object, quantization: str) -> None:
    """Refuses strategies that divide weights: bitsandbytes' can't be, and the others' checkpoints would hold the base.

    Raises:
        UserError: it is one of them; says what to set.
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
    if not hasattr(type(strategy), "backend"):  # of the class: a strategy's own is there once processes have begun
        raise UserError(
            f"trainer.strategy {name}: set it to lightning_modules.strategies.FSDP2Strategy, which divides a bf16 base "
            "over GPUs and keeps it out of checkpoints, or to ddp"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is divided over ranks (FSDP2's DTensor), and whole only while its module computes."""
    return hasattr(tensor, "to_local")


def gather_positions(tensor_N: Tensor, positions_N: Tensor | None) -> Tensor:
    """The given entries of the first axis; all where None."""
    return tensor_N if positions_N is None else tensor_N.index_select(0, positions_N)


def supervised_positions(batch: Batch, multiple: int = 1) -> Tensor:
    """Indices [N] into the flattened rows of the positions that carry a label, in order.

    The count comes from the host (``batch.supervised``), so that nothing waits for the device; a batch that does not
    say is counted there.

    Args:
        batch: labelled rows.
        multiple: N is rounded up to it with positions that carry none (they count nothing).
    """
    unlabelled = (batch.labels_BT == IGNORE_INDEX).flatten()
    count = batch.supervised or int((~unlabelled).sum())
    count = min(-(-count // multiple) * multiple, len(unlabelled))
    return torch.argsort(unlabelled, stable=True)[:count]
