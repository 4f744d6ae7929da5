"""The fast path: a Llama or Mistral decoder run block by fused block, over packed rows.

``activation_checkpointing`` trades memory for time. A layer of a 7B model keeps, a token:

- ``none``: 94 KB; nothing expensive is computed twice;
- ``selective``: 37 KB; gate and up (57 KB) are computed again in the backward pass, 1.3 times the forward's work;
- ``full``: 8 KB, the layer's input; the whole layer is computed again;
- ``offload``: as ``full``, and the 8 KB are kept in host memory.
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
from lightning_modules.models.fused_blocks import MLP, Attention, AttentionBlock, MLPBlock, Norm
from lightning_modules.models.fused_lora import Group, Projection

MODEL_TYPES = ("llama", "mistral")
Watch = Callable[[str, Tensor], None]
CHUNK = 2048  #: tokens of a piece of the MLP where gate and up are made again


@dataclass(frozen=True)
class _Layer:
    attention: Attention
    mlp: MLP

    @classmethod
    def of(cls, layer: Any, heads: tuple[int, int], undo_nesting: bool) -> _Layer:
        def group(parent: Any, *names: str) -> Group:
            return Group([Projection.of(getattr(parent, name), undo_nesting) for name in names])

        def norm(module: Any) -> Norm:
            return Norm(module.weight, module.variance_epsilon)

        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            Attention(
                norm(layer.input_layernorm),
                group(attention, "q_proj", "k_proj", "v_proj"),
                group(attention, "o_proj"),
                heads,
                attention.scaling,
            ),
            MLP(norm(layer.post_attention_layernorm), group(mlp, "gate_proj", "up_proj"), group(mlp, "down_proj")),
        )

    def without_adapter(self) -> _Layer:
        attention, mlp = self.attention, self.mlp
        return _Layer(
            replace(attention, qkv=attention.qkv.without_adapter(), output=attention.output.without_adapter()),
            replace(mlp, wide=mlp.wide.without_adapter(), down=mlp.down.without_adapter()),
        )

    def groups(self) -> tuple[Group, ...]:
        return self.attention.qkv, self.attention.output, self.mlp.wide, self.mlp.down

    def attention_parameters(self) -> list[Tensor | None]:
        return self.attention.qkv.parameters() + self.attention.output.parameters()

    def mlp_parameters(self) -> list[Tensor | None]:
        return self.mlp.wide.parameters() + self.mlp.down.parameters()


class FusedDecoder(Decoder):
    """Runs a Hugging Face decoder's blocks by :mod:`lightning_modules.models.fused_blocks`' fused functions.

    Args:
        model: a causal LM, as it is or wrapped by PEFT; it keeps owning every parameter.
        activation_checkpointing: see the module's docstring.
        fp8: whether products with the frozen base are computed in FP8.

    Raises:
        NotImplementedError: the model has something that the fused functions do not compute; the message says what.
    """

    def __init__(
        self, model: Any, activation_checkpointing: ActivationCheckpointing = "none", fp8: bool = False
    ) -> None:
        super().__init__(model)
        config = self.config
        if config.model_type not in MODEL_TYPES:
            raise NotImplementedError(f"the architecture is {config.model_type}, not one of {', '.join(MODEL_TYPES)}")
        if config.hidden_act != "silu":
            raise NotImplementedError(f"the MLP's activation is {config.hidden_act}, not silu")
        self.decoder = self.model.model
        if any(parameter.requires_grad for parameter in self.decoder.embed_tokens.parameters()):
            raise NotImplementedError("the embeddings are trained")
        self.activation_checkpointing = activation_checkpointing
        self.window = getattr(config, "sliding_window", None)
        heads = (config.num_attention_heads, config.num_key_value_heads)
        self.group = heads[0] // heads[1]
        self.head_width = self.decoder.layers[0].self_attn.head_dim
        self.layers = [_Layer.of(layer, heads, activation_checkpointing != "offload") for layer in self.decoder.layers]
        for group in (g for layer in self.layers for g in layer.groups() if fp8):
            group.to_fp8(self.dtype)

    def without_adapter(self) -> FusedDecoder:
        """The base alone; it shares every weight, those of FP8 and the scales of NF4 too."""
        base = copy.copy(self)
        base.layers = [layer.without_adapter() for layer in self.layers]
        return base

    def hidden_states(self, batch: Batch) -> Tensor:
        """Computes the last hidden states [B, T, C], behind the final norm."""
        return self.decoder.norm(self._blocks(batch).view(*batch.input_ids_BT.shape, -1))

    def hidden_states_at(self, batch: Batch, positions_N: Tensor | None) -> Tensor:
        """The same at some positions [N, C]; the last layer's output and MLP are computed there only."""
        return self.decoder.norm(self._blocks(batch, positions_N))

    def hidden_states_of_layers(
        self, batch: Batch, positions_N: Tensor | None, names: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """The same, and the outputs [N, C] of named layers."""
        layers = [f"layers.{number}" for number in range(len(self.layers))]
        check_names(names, layers)
        found: dict[str, Tensor] = {}

        def watch(name: str, hidden_NC: Tensor) -> None:
            if name in names:
                # the last layer's output has these positions alone
                found[name] = hidden_NC if name == layers[-1] else gather_positions(hidden_NC, positions_N)

        hidden_NC = self.decoder.norm(self._blocks(batch, positions_N, watch))
        return hidden_NC, [found[name] for name in names]

    def plan(self, segment_ids_BT: Tensor) -> AttentionPlan:
        """Lays out the attention of a batch whose segments are on the host."""
        return build_attention_plan(segment_ids_BT, self.group)

    def _blocks(self, batch: Batch, positions_N: Tensor | None = None, watch: Watch | None = None) -> Tensor:
        plan = batch.plan if batch.plan is not None else self.plan(batch.segment_ids_BT.cpu())
        plan = plan.to(batch.input_ids_BT.device)
        return self.run(batch.input_ids_BT, batch.position_ids_BT, plan, positions_N, watch)

    def run(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        plan: AttentionPlan,
        positions_N: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Computes the hidden states [N, C] of all rows in one line, or of some positions of it, before the final norm.

        Args:
            input_ids_BT: tokens.
            position_ids_BT: rotary positions.
            plan: of the attention.
            positions_N: of the line; the last layer's output and MLP are computed there only.
            watch: is given every layer's name and output.

        Raises:
            ValueError: an example is longer than the model's attention window.
        """
        if self.window is not None and plan.longest > self.window:
            raise ValueError(f"an example is longer than the model's attention window of {self.window} tokens")
        embedded_BTC = self.decoder.embed_tokens(input_ids_BT)
        cos, sin = (x.flatten(0, 1) for x in self.decoder.rotary_emb(embedded_BTC, position_ids_BT))
        hidden_NC = embedded_BTC.flatten(0, 1)
        for number, layer in enumerate(self.layers, start=1):
            wanted_N = positions_N if number == len(self.layers) else None
            hidden_NC = self._layer(layer, hidden_NC, cos, sin, plan, wanted_N)
            if watch is not None:
                watch(f"layers.{number - 1}", hidden_NC)
        return hidden_NC

    def _layer(self, layer: _Layer, hidden_NC: Tensor, *rest: Any) -> Tensor:
        if self.activation_checkpointing not in ("full", "offload") or not torch.is_grad_enabled():
            return self._block(layer, hidden_NC, *rest)
        adapted = any(p is not None for p in (*layer.attention_parameters(), *layer.mlp_parameters()))
        if not hidden_NC.requires_grad and not adapted:
            return self._block(layer, hidden_NC, *rest)
        with _offloaded(hidden_NC.shape) if self.activation_checkpointing == "offload" else nullcontext():
            return checkpoint(self._block, layer, hidden_NC, *rest, use_reentrant=False)

    def _block(
        self,
        layer: _Layer,
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
    """Chooses the path of a model's forward and backward pass.

    Args:
        model: a causal LM, as it is or wrapped by PEFT.
        kernels: ``auto``, ``fused`` or ``eager``.
        activation_checkpointing: see the module's docstring.
        device: where the model is.
        fp8: whether products with the frozen base are computed in FP8, which only the fused kernels can.
        fused_unsupported_reason: why the fast path can't run where the model is, if so.

    Returns:
        The decoder, and one line that says which it is and why.

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
    try:
        if fused_unsupported_reason is not None:
            raise NotImplementedError(fused_unsupported_reason)
        if device.type not in ("cuda", "cpu"):
            raise NotImplementedError(f"the device is {device.type}")
        fused = FusedDecoder(model, activation_checkpointing, fp8)
        if device.type == "cuda":
            _check_kernels(fused)
    except NotImplementedError as error:
        if kernels == "fused" or fp8:
            option, fix = ("fp8=true", "false") if fp8 else ("kernels=fused", "auto or eager")
            raise UserError(f"backbone.{option}: {error}. Fix: set it to {fix}") from error
        used = "full" if activation_checkpointing in ("selective", "offload") else activation_checkpointing
        instead = f" instead of {activation_checkpointing}" if used != activation_checkpointing else ""
        return Decoder(model), f"eager kernels ({error}), activation_checkpointing {used}{instead}"
    products = ", FP8 products with the base" if fp8 else ""
    kind = fused.config.model_type
    return fused, f"fused kernels for {kind}, activation_checkpointing {activation_checkpointing}{products}"


def _check_fp8(kernels: str, device: torch.device) -> None:
    if kernels == "eager":
        raise UserError("backbone.fp8=true: needs fused kernels. Fix: set backbone.kernels auto, or backbone.fp8 false")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"backbone.fp8 true: {torch.cuda.get_device_name(device)} has no FP8 products, as Ada and Hopper have; "
            "set backbone.fp8 false"
        )


def _check_kernels(decoder: FusedDecoder) -> None:
    """Raises NotImplementedError for a model that the GPU's attention kernels do not compute."""
    if decoder.dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError(f"its attention kernels take 16-bit numbers, the model is {decoder.dtype}")
    if decoder.head_width not in (16, 32, 64, 128):
        raise NotImplementedError(f"its attention kernels take heads 16, 32, 64 or 128 wide, not {decoder.head_width}")
    if torch.cuda.get_device_capability() < (8, 0):
        raise NotImplementedError(
            f"its attention kernels want an Ampere GPU or newer, not {torch.cuda.get_device_name()}"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError("its kernels need triton, which this torch came without") from error


class _offloaded(torch.autograd.graph.saved_tensors_hooks):
    """Keeps a layer's saved input in page-locked host memory until the backward pass wants it."""

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
