"""Decoders of Llama and Mistral models that run fused blocks over packed rows.

``activation_checkpointing`` trades memory for time. Per token, a layer of a 7B model keeps:

- ``none``: 94 KB; nothing expensive is computed twice;
- ``selective``: 37 KB; gate and up (57 KB) are recomputed in the backward pass, 1.3 times the work of a forward pass;
- ``full``: 8 KB, the input of the layer, on its device; the backward pass recomputes the whole layer;
- ``offload``: these 8 KB, in host memory; the whole layer is recomputed, gate and up in chunks, as in ``selective``.

Shapes in names: B rows, T tokens per row, N tokens of all rows, concatenated, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from datamodules.batch import Batch
from datamodules.errors import UserError
from lightning_modules.kernels.attention_plan import AttentionPlan, build_attention_plan
from lightning_modules.kernels.fp8 import CAPABILITY
from lightning_modules.models.backbone import ActivationCheckpointing
from lightning_modules.models.backend import gather_positions
from lightning_modules.models.decoder import Decoder, check_names
from lightning_modules.models.fused_blocks import AttentionBlock, AttentionWeights, MLPBlock, MLPWeights, NormWeights
from lightning_modules.models.fused_lora import Projection, ProjectionGroup
from lightning_modules.models.fused_support import ModelTraits, gpu_unsupported_reason, unsupported_reason

LayerHook = Callable[[str, Tensor], None]  #: receives the name and the output of a layer
CHUNK = 2048  #: tokens of a chunk of the MLP if gate and up are recomputed


@dataclass(frozen=True)
class _LayerWeights:
    """Weights of a decoder layer."""

    attention: AttentionWeights
    mlp: MLPWeights

    @classmethod
    def of(cls, layer: Any, heads: tuple[int, int], undo_nesting: bool) -> _LayerWeights:
        def group(parent: Any, *names: str) -> ProjectionGroup:
            return ProjectionGroup([Projection.of(getattr(parent, name), undo_nesting) for name in names])

        def norm(module: Any) -> NormWeights:
            return NormWeights(module.weight, module.variance_epsilon)

        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            AttentionWeights(
                norm(layer.input_layernorm),
                group(attention, "q_proj", "k_proj", "v_proj"),
                group(attention, "o_proj"),
                heads,
                attention.scaling,
            ),
            MLPWeights(
                norm(layer.post_attention_layernorm), group(mlp, "gate_proj", "up_proj"), group(mlp, "down_proj")
            ),
        )

    def without_adapter(self) -> _LayerWeights:
        attention, mlp = self.attention, self.mlp
        return _LayerWeights(
            replace(attention, qkv=attention.qkv.without_adapter(), output=attention.output.without_adapter()),
            replace(mlp, gate_up=mlp.gate_up.without_adapter(), down=mlp.down.without_adapter()),
        )

    def groups(self) -> tuple[ProjectionGroup, ...]:
        return self.attention.qkv, self.attention.output, self.mlp.gate_up, self.mlp.down

    def attention_parameters(self) -> list[Tensor | None]:
        return self.attention.qkv.parameters() + self.attention.output.parameters()

    def mlp_parameters(self) -> list[Tensor | None]:
        return self.mlp.gate_up.parameters() + self.mlp.down.parameters()


class FusedDecoder(Decoder):
    """Runs the blocks of a Hugging Face decoder by :mod:`lightning_modules.models.fused_blocks`.

    Args:
        model: a causal LM, with or without PEFT's wrapper; it keeps owning every parameter.
        activation_checkpointing: see the module's docstring.
        fp8: whether products with the frozen base are computed in FP8.

    Raises:
        NotImplementedError: the fused functions do not support the model; the message has the reason.
    """

    def __init__(
        self, model: Any, activation_checkpointing: ActivationCheckpointing = "none", fp8: bool = False
    ) -> None:
        super().__init__(model)
        if reason := unsupported_reason(ModelTraits.of_model(model)):
            raise NotImplementedError(reason)
        config = self.config
        self.decoder = self.model.model
        self.activation_checkpointing = activation_checkpointing
        self.window = getattr(config, "sliding_window", None)
        heads = (config.num_attention_heads, config.num_key_value_heads)
        self.group = heads[0] // heads[1]
        self.layers = [
            _LayerWeights.of(layer, heads, activation_checkpointing != "offload") for layer in self.decoder.layers
        ]
        for group in (g for layer in self.layers for g in layer.groups() if fp8):
            group.to_fp8(self.dtype)

    def without_adapter(self) -> FusedDecoder:
        """Returns a decoder of the base alone, which shares every weight, including FP8 weights and scales of NF4."""
        base = copy.copy(self)
        base.layers = [layer.without_adapter() for layer in self.layers]
        return base

    def hidden_states(self, batch: Batch) -> Tensor:
        """Computes the last hidden states [B, T, C], after the final norm."""
        return self.decoder.norm(self._blocks(batch).view(*batch.input_ids_BT.shape, -1))

    def hidden_states_at(self, batch: Batch, positions_N: Tensor | None) -> Tensor:
        """Computes them at some positions [N, C]; output projection and MLP of the last layer run there only."""
        return self.decoder.norm(self._blocks(batch, positions_N))

    def hidden_states_of_layers(
        self, batch: Batch, positions_N: Tensor | None, names: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes the same, and the outputs [N, C] of the given layers."""
        layers = [f"layers.{number}" for number in range(len(self.layers))]
        check_names(names, layers)
        outputs: dict[str, Tensor] = {}

        def keep(name: str, hidden_NC: Tensor) -> None:
            if name in names:
                # the output of the last layer has these positions only
                outputs[name] = hidden_NC if name == layers[-1] else gather_positions(hidden_NC, positions_N)

        hidden_NC = self.decoder.norm(self._blocks(batch, positions_N, keep))
        return hidden_NC, [outputs[name] for name in names]

    def plan(self, segment_ids_BT: Tensor) -> AttentionPlan:
        """Builds the attention plan of a batch whose segment ids are on the host."""
        return build_attention_plan(segment_ids_BT, self.group)

    def _blocks(self, batch: Batch, positions_N: Tensor | None = None, hook: LayerHook | None = None) -> Tensor:
        plan = batch.plan if batch.plan is not None else self.plan(batch.segment_ids_BT.cpu())
        plan = plan.to(batch.input_ids_BT.device)
        return self.run(batch.input_ids_BT, batch.position_ids_BT, plan, positions_N, hook)

    def run(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        plan: AttentionPlan,
        positions_N: Tensor | None = None,
        hook: LayerHook | None = None,
    ) -> Tensor:
        """Computes the hidden states [N, C] of all rows, concatenated, or of some positions, before the final norm.

        Args:
            input_ids_BT: tokens.
            position_ids_BT: rotary positions.
            plan: of the attention.
            positions_N: of the concatenated rows; output projection and MLP of the last layer run there only.
            hook: called with the name and the output of every layer.

        Raises:
            ValueError: an example is longer than the model's attention window.
        """
        if self.window is not None and plan.longest > self.window:
            raise ValueError(f"an example is longer than the model's attention window of {self.window} tokens")
        embedded_BTC = self.decoder.embed_tokens(input_ids_BT)
        cos, sin = (x.flatten(0, 1) for x in self.decoder.rotary_emb(embedded_BTC, position_ids_BT))
        hidden_NC = embedded_BTC.flatten(0, 1)
        for number, layer in enumerate(self.layers, start=1):
            selected_N = positions_N if number == len(self.layers) else None
            hidden_NC = self._layer(layer, hidden_NC, cos, sin, plan, selected_N)
            if hook is not None:
                hook(f"layers.{number - 1}", hidden_NC)
        return hidden_NC

    def _layer(self, layer: _LayerWeights, hidden_NC: Tensor, *rest: Any) -> Tensor:
        if self.activation_checkpointing not in ("full", "offload") or not torch.is_grad_enabled():
            return self._block(layer, hidden_NC, *rest)
        adapted = any(p is not None for p in (*layer.attention_parameters(), *layer.mlp_parameters()))
        if not hidden_NC.requires_grad and not adapted:
            return self._block(layer, hidden_NC, *rest)
        with OffloadSavedTensors(hidden_NC.shape) if self.activation_checkpointing == "offload" else nullcontext():
            return checkpoint(self._block, layer, hidden_NC, *rest, use_reentrant=False)

    def _block(
        self,
        layer: _LayerWeights,
        hidden_NC: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: AttentionPlan,
        positions_N: Tensor | None,
    ) -> Tensor:
        hidden_NC = AttentionBlock.apply(
            hidden_NC, layer.attention, cos, sin, plan, positions_N, *layer.attention_parameters()
        )
        return MLPBlock.apply(
            hidden_NC, layer.mlp, self.activation_checkpointing in ("none", "full"), CHUNK, *layer.mlp_parameters()
        )


def build_decoder(
    model: Any,
    kernels: str,
    activation_checkpointing: ActivationCheckpointing,
    device: torch.device,
    fp8: bool = False,
    fused_unsupported_reason: str | None = None,
) -> tuple[Decoder, str]:
    """Builds the decoder that computes the forward and backward passes of a model.

    Args:
        model: a causal LM, with or without PEFT's wrapper.
        kernels: ``auto``, ``fused`` or ``eager``.
        activation_checkpointing: see the module's docstring.
        device: of the model.
        fp8: whether products with the frozen base are computed in FP8; needs the fused kernels.
        fused_unsupported_reason: why the strategy of the trainer excludes the fused kernels; None if it does not.

    Returns:
        The decoder, and one line that describes it and the reason for the choice.

    Raises:
        UserError: the options need the fused kernels, which do not support the model or the device.
    """
    if fp8:
        _check_fp8(kernels, device)
    if kernels == "eager":
        if activation_checkpointing in ("selective", "offload"):
            raise UserError(
                f"backbone.activation_checkpointing={activation_checkpointing}: needs fused kernels, and "
                "backbone.kernels is eager. Fix: set activation_checkpointing to none or full"
            )
        return Decoder(model), f"eager kernels (as configured), activation_checkpointing {activation_checkpointing}"
    reason = unsupported_reason(ModelTraits.of_model(model), device.type, fused_unsupported_reason)
    reason = reason or gpu_unsupported_reason(device)
    if reason is None:
        try:
            fused = FusedDecoder(model, activation_checkpointing, fp8)
        except NotImplementedError as error:  # FP8 products do not support the sizes
            reason = str(error)
        else:
            products = ", FP8 products with the base" if fp8 else ""
            kind = fused.config.model_type
            return fused, f"fused kernels for {kind}, activation_checkpointing {activation_checkpointing}{products}"
    if kernels == "fused" or fp8:
        option, fix = ("fp8=true", "false") if fp8 else ("kernels=fused", "auto or eager")
        raise UserError(f"backbone.{option}: {reason}. Fix: set it to {fix}")
    used = "full" if activation_checkpointing in ("selective", "offload") else activation_checkpointing
    instead = f" instead of {activation_checkpointing}" if used != activation_checkpointing else ""
    return Decoder(model), f"eager kernels ({reason}), activation_checkpointing {used}{instead}"


def _check_fp8(kernels: str, device: torch.device) -> None:
    if kernels == "eager":
        raise UserError("backbone.fp8=true: needs fused kernels. Fix: set backbone.kernels auto, or backbone.fp8 false")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"backbone.fp8=true: {torch.cuda.get_device_name(device)} has no FP8 products (Ada, Hopper and newer do). "
            "Fix: set backbone.fp8 false"
        )


class OffloadSavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Keeps the saved input of a layer in page-locked host memory until the backward pass needs it.

    Args:
        shape: of the input; other saved tensors stay on their device.
    """

    def __init__(self, shape: torch.Size) -> None:
        def pack(tensor: Tensor) -> Any:
            if not tensor.is_cuda or tensor.shape != shape:
                return tensor
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            return tensor.device, host

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, host = packed
            return host.to(device, non_blocking=True)

        super().__init__(pack, unpack)
