"""The backend for FSDP2: weights are built on the host, sharded over GPUs and gathered layer by layer."""

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

    Each decoder layer is one FSDP2 group. Its weights are gathered on a GPU while the layer is computed, forward and
    backward, and sharded over all GPUs otherwise, with the adapter's gradients and optimizer state. Embeddings, final
    norm and head are replicated on every GPU: they are frozen, the head is computed in chunks (whose number differs
    between ranks, and a gathering needs all ranks), and FSDP2 would keep its root gathered anyway.

    Args:
        mesh: of one dimension, the ranks that weights are sharded over.
        device: of this rank.
    """

    fused_unsupported_reason = (
        "trainer.strategy shards the weights over GPUs and gathers them only for the forward pass of modules"
    )

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh, self.device = mesh, device

    def check(self, quantization: str, teacher: bool = False) -> None:
        """Refuses a teacher, which would read sharded weights outside of their modules."""
        if teacher:
            raise UserError(
                "objective.teacher with trainer.strategy FSDP2Strategy: a teacher can't read sharded weights; set "
                f"objective.cache and run cache-teacher on one GPU first, {ANOTHER_STRATEGY}"
            )

    def build(self, backbone: Backbone, device: torch.device) -> Any:
        """Builds the model without content, shards it, and fills it from rank zero's copy, one weight at a time.

        Meanwhile rank zero holds the full model in host memory (14.5 GB for Mistral-7B in bf16), the other ranks
        nothing. A GPU holds its shards, embeddings and head, and one full weight.

        Raises:
            UserError: the backbone can't be built, or has a setting that sharded weights do not support.
        """
        _check_backbone(backbone)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*meta parameter.*")  # an adapter's file is read on rank zero
            model = backbone.build("meta").to("meta")
        self._shard(model)
        model.to_empty(device=self.device)
        Decoder(model).model.tie_weights()  # a tied head became a tensor of its own
        full = self._build_on_rank_zero(backbone)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._fill(tensor, full[name] if self._is_first else None)
        return model

    @property
    def _is_first(self) -> bool:
        return self.mesh.get_local_rank() == 0

    def _shard(self, model: nn.Module) -> None:
        decoder = Decoder(model).model.get_decoder()
        for name, module in decoder.named_modules():
            if re.fullmatch(r"[^\d.]+\.\d+", name):  # layers.7, but not the experts in it
                fully_shard(module, mesh=self.mesh)
        replicated = {p for p in model.parameters() if not isinstance(p, DTensor)}
        if trained := [n for n, p in model.named_parameters() if p in replicated and p.requires_grad]:
            raise UserError(
                f"backbone.lora.target_modules: {trained[0]} is outside of the decoder's layers, where FSDP2Strategy "
                f"can't train; name projections of the layers only, {ANOTHER_STRATEGY}"
            )
        fully_shard(decoder, mesh=self.mesh, ignored_params=replicated)  # the root prefetches the next layer

    def _build_on_rank_zero(self, backbone: Backbone) -> dict[str, Tensor]:
        """Returns the full model's tensors in host memory on rank zero, none on others; all ranks raise its error."""
        tensors: dict[str, Tensor] = {}
        failure: list[UserError | None] = [None]
        if self._is_first:
            try:
                model = backbone.build("cpu")
                tensors = dict((*model.named_parameters(), *model.named_buffers()))
            except UserError as error:
                failure = [error]
        torch.distributed.broadcast_object_list(failure, 0)
        if failure[0] is not None:
            raise failure[0]
        return tensors

    @torch.no_grad()
    def _fill(self, tensor: Tensor, full: Tensor | None) -> None:
        """Copies a tensor of rank zero, which is None on other ranks, into a sharded or replicated tensor."""
        content = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        if full is not None:
            content.copy_(full)
        if isinstance(tensor, DTensor):
            shard = distribute_tensor(content, tensor.device_mesh, tensor.placements)  # scatters rank zero's content
            tensor.to_local().copy_(shard.to_local())
        else:
            torch.distributed.broadcast(content, 0)
            tensor.copy_(content)

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gathers tensors and copies them to the host; every rank must call it."""
        return {name: gather(tensor).cpu() for name, tensor in tensors.items()}

    @contextmanager
    def uneven_forward_context(self, model: nn.Module) -> Iterator[None]:
        """Has ranks that are done take part in the gathering for the calls of the other ranks.

        Before each call a rank announces it in a collective. A rank that is done announces none, and computes one
        unused token for as long as any rank announces a call.
        """
        decoder = Decoder(model).model.get_decoder()

        def num_callers(calls: int) -> Tensor:
            count = torch.tensor(calls, device=self.device)
            torch.distributed.all_reduce(count)
            return count

        def announce(*_: Any) -> None:
            num_callers(1)

        hook = decoder.register_forward_pre_hook(announce, prepend=True)  # before FSDP2 gathers
        try:
            yield
        finally:
            hook.remove()
        with torch.no_grad():
            while num_callers(0):
                decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Computes the norm of the full gradients, of which each rank has shards."""
        return gather(super().total_norm(gradients))

    def local_shards(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns this rank's shards, for element-wise operations."""
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def gather(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor; every rank must call it. Any other tensor is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shards a tensor that every rank has as another tensor of its shape; returns it unchanged without such a one."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _check_backbone(backbone: Backbone) -> None:
    if backbone.lora is None and backbone.adapter is None:
        raise UserError(
            "backbone.lora null with trainer.strategy FSDP2Strategy: it shards a frozen base and its adapters; set "
            f"backbone.lora (rank 16, alpha 32), {ANOTHER_STRATEGY}"
        )
    if backbone.activation_checkpointing in ("selective", "offload"):
        raise UserError(
            f"backbone.activation_checkpointing={backbone.activation_checkpointing}: needs fused kernels, which do not "
            "run with trainer.strategy FSDP2Strategy. Fix: set activation_checkpointing to full"
        )
