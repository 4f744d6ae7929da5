"""What the model's parts do where FSDP2 divides weights over GPUs: built on the host, gathered layer by layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from datamodules.errors import UserError
from lightning_modules.models.backend import Backend
from lightning_modules.models.decoder import Decoder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_modules.models.backbone import Backbone

ANOTHER_STRATEGY = "or trainer.strategy ddp, which keeps the base whole on every GPU"


class FSDP2Backend(Backend):
    """See :class:`lightning_modules.models.backend.Backend`.

    Each decoder layer is a group of its own: its weights are whole on a GPU while the layer is computed, forward and
    backward, and divided over all GPUs otherwise, with the adapter's gradients and optimizer state. Embeddings, final
    norm and head stay whole on every GPU: they are frozen, the head is computed a chunk at a time (their number
    differs between ranks, which may not gather apart from each other), and FSDP2 would keep its root whole anyway.

    Args:
        mesh: of one dimension, the ranks that weights are divided over.
        device: this rank's.
    """

    fused_unsupported_reason = (
        "trainer.strategy divides the weights over GPUs, which gathers them for modules' own forward pass only"
    )

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh, self.device = mesh, device

    def check(self, quantization: str, teacher: bool = False) -> None:
        """Refuses a teacher, which would read divided weights outside of their modules."""
        if teacher:
            raise UserError(
                "objective.teacher with trainer.strategy FSDP2Strategy: no teacher can run beside a divided model; set "
                f"objective.cache and run cache-teacher on one GPU first, {ANOTHER_STRATEGY}"
            )

    def build(self, recipe: Backbone, device: torch.device) -> Any:
        """Builds the model without content, divides it, and fills it from rank zero's copy, a weight at a time.

        Rank zero holds the whole model in host memory meanwhile (14.5 GB for Mistral-7B in bf16), the others nothing; a
        GPU holds its part, embeddings and head, and one whole weight.

        Raises:
            UserError: the recipe can't be built, or asks for what can't be divided.
        """
        _check_recipe(recipe)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*meta parameter.*")  # an adapter's file is read on rank zero
            model = recipe.build("meta").to("meta")
        self._divide(model)
        model.to_empty(device=self.device)
        Decoder(model).model.tie_weights()  # a head that is the embeddings' tensor was made apart
        whole = self._on_rank_zero(recipe)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._fill(tensor, whole[name] if self._first else None)
        return model

    @property
    def _first(self) -> bool:
        return self.mesh.get_local_rank() == 0

    def _divide(self, model: nn.Module) -> None:
        decoder = Decoder(model).model.get_decoder()
        for name, module in decoder.named_modules():
            if re.fullmatch(r"[^\d.]+\.\d+", name):  # layers.7, and not the experts within
                fully_shard(module, mesh=self.mesh)
        whole = {p for p in model.parameters() if not isinstance(p, DTensor)}
        if trained := [n for n, p in model.named_parameters() if p in whole and p.requires_grad]:
            raise UserError(
                f"backbone.lora.target_modules: {trained[0]} lies outside of the decoder's layers, which "
                "FSDP2Strategy can't "
                f"train; name projections of the layers only, {ANOTHER_STRATEGY}"
            )
        fully_shard(decoder, mesh=self.mesh, ignored_params=whole)  # the root, which has one layer fetch the next

    def _on_rank_zero(self, recipe: Backbone) -> dict[str, Tensor]:
        """The tensors of a whole model in host memory on rank zero, none elsewhere; all fail where that one does."""
        tensors: dict[str, Tensor] = {}
        failure: list[UserError | None] = [None]
        if self._first:
            try:
                model = recipe.build("cpu")
                tensors = dict((*model.named_parameters(), *model.named_buffers()))
            except UserError as error:
                failure = [error]
        torch.distributed.broadcast_object_list(failure, 0)
        if failure[0] is not None:
            raise failure[0]
        return tensors

    @torch.no_grad()
    def _fill(self, tensor: Tensor, whole: Tensor | None) -> None:
        here = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        if whole is not None:
            here.copy_(whole)
        if isinstance(tensor, DTensor):
            part = distribute_tensor(here, tensor.device_mesh, tensor.placements)  # rank zero's, scattered
            tensor.to_local().copy_(part.to_local())
        else:
            torch.distributed.broadcast(here, 0)
            tensor.copy_(here)

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gathers tensors, which takes every rank."""
        return {name: gather(tensor).cpu() for name, tensor in tensors.items()}

    @contextmanager
    def uneven_forward_context(self, model: nn.Module) -> Iterator[None]:
        """Has ranks that are done take part in the gathering of the others' calls.

        Before every call each rank says that it makes one; a rank that is done says so instead, and computes one token
        for nobody as long as any rank goes on.
        """
        decoder = Decoder(model).model.get_decoder()

        def callers(mine: int) -> Tensor:
            count = torch.tensor(mine, device=self.device)
            torch.distributed.all_reduce(count)
            return count

        def announce(*_: Any) -> None:
            callers(1)

        hook = decoder.register_forward_pre_hook(announce, prepend=True)  # before FSDP2 gathers
        try:
            yield
        finally:
            hook.remove()
        with torch.no_grad():
            while callers(0):
                decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of whole gradients, of which each rank has a part."""
        return gather(super().total_norm(gradients))

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts, for what is done element by element."""
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def gather(tensor: Tensor) -> Tensor:
    """Gathers a divided tensor, on every rank; another is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def divided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, divided as another of its shape is; else the tensor itself."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _check_recipe(recipe: Backbone) -> None:
    if recipe.lora is None and recipe.adapter is None:
        raise UserError(
            "backbone.lora null with trainer.strategy FSDP2Strategy: it divides a frozen base and its adapters; set "
            f"backbone.lora (rank 16, alpha 32), {ANOTHER_STRATEGY}"
        )
    if recipe.activation_checkpointing in ("selective", "offload"):
        raise UserError(
            f"backbone.activation_checkpointing={recipe.activation_checkpointing}: needs fused kernels, which "
            "do not run with "
            "trainer.strategy FSDP2Strategy. Fix: set activation_checkpointing to full"
        )
