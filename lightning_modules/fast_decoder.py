"""The fast path: a Llama or Mistral decoder run block by fused block, over packed rows.

``activation_memory`` trades memory for time. A layer of a 7B model keeps, a token:

- ``full``: 94 KB; nothing expensive is computed twice;
- ``balanced``: 37 KB; gate and up (57 KB) are computed again in the backward pass, 1.3 times the forward's work;
- ``low``: 8 KB, held in host memory; whole layers are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from datamodules.batch import Batch
from datamodules.errors import UserError
from lightning_modules.backbone import ActivationMemory
from lightning_modules.decoder import Decoder
from lightning_modules.fast_lora import Group, Norm, NormMLPResidual, NormQKV, OutputResidual, Projection
from lightning_modules.packed_attention import SegmentPlan, packed_attention, plan_segments

MODEL_TYPES = ("llama", "mistral")
CHUNK = 2048  #: tokens of a piece of the MLP where gate and up are made again


@dataclass(frozen=True)
class _Layer:
    attention_norm: Norm
    mlp_norm: Norm
    qkv: Group
    output: Group
    gate_up: Group
    down: Group

    @classmethod
    def of(cls, layer: Any, undo_nesting: bool) -> _Layer:
        def group(parent: Any, *names: str) -> Group:
            return Group([Projection.of(getattr(parent, name), undo_nesting) for name in names])

        def norm(module: Any) -> Norm:
            return Norm(module.weight, module.variance_epsilon)

        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            norm(layer.input_layernorm),
            norm(layer.post_attention_layernorm),
            group(attention, "q_proj", "k_proj", "v_proj"),
            group(attention, "o_proj"),
            group(mlp, "gate_proj", "up_proj"),
            group(mlp, "down_proj"),
        )


class FastDecoder(Decoder):
    """Runs a Hugging Face decoder's blocks by :mod:`lightning_modules.fast_lora`'s fused functions.

    Args:
        model: a causal LM, as it is or wrapped by PEFT; it keeps owning every parameter.
        activation_memory: see the module's docstring.

    Raises:
        NotImplementedError: the model has something that the fused functions do not compute; the message says what.
    """

    def __init__(self, model: Any, activation_memory: ActivationMemory = "full") -> None:
        super().__init__(model)
        config = self.config
        if config.model_type not in MODEL_TYPES:
            raise NotImplementedError(f"the architecture is {config.model_type}, not one of {', '.join(MODEL_TYPES)}")
        if config.hidden_act != "silu":
            raise NotImplementedError(f"the MLP's activation is {config.hidden_act}, not silu")
        self.decoder = self.model.model
        if any(parameter.requires_grad for parameter in self.decoder.embed_tokens.parameters()):
            raise NotImplementedError("the embeddings are trained")
        self.activation_memory = activation_memory
        self.window = getattr(config, "sliding_window", None)
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.scale = self.decoder.layers[0].self_attn.scaling
        self.layers = [_Layer.of(layer, activation_memory != "low") for layer in self.decoder.layers]

    def hidden_states(self, batch: Batch) -> Tensor:
        """Computes the last hidden states [B, T, C], behind the final norm."""
        return self.decoder.norm(self._blocks(batch).view(*batch.input_ids_BT.shape, -1))

    def hidden_at(self, batch: Batch, positions_N: Tensor) -> Tensor:
        """The same at some positions [N, C]; the final norm is computed there only."""
        return self.decoder.norm(self._blocks(batch).index_select(0, positions_N))

    def _blocks(self, batch: Batch) -> Tensor:
        plan = batch.plan if batch.plan is not None else plan_segments(batch.segment_ids_BT.cpu())
        return self.run(batch.input_ids_BT, batch.position_ids_BT, plan.to(batch.input_ids_BT.device))

    def run(self, input_ids_BT: Tensor, position_ids_BT: Tensor, plan: SegmentPlan) -> Tensor:
        """Computes the hidden states [N, C] of all rows in one line, before the final norm.

        Raises:
            ValueError: an example is longer than the model's attention window.
        """
        if self.window is not None and plan.longest + max((p.length for p in plan.prefixes), default=0) > self.window:
            raise ValueError(f"an example is longer than the model's attention window of {self.window} tokens")
        embedded_BTC = self.decoder.embed_tokens(input_ids_BT)
        cos, sin = (x.flatten(0, 1) for x in self.decoder.rotary_emb(embedded_BTC, position_ids_BT))
        hidden_NC = embedded_BTC.flatten(0, 1)
        for layer in self.layers:
            hidden_NC = self._layer(layer, hidden_NC, cos, sin, plan)
        return hidden_NC

    def _layer(self, layer: _Layer, hidden_NC: Tensor, cos: Tensor, sin: Tensor, plan: SegmentPlan) -> Tensor:
        if self.activation_memory != "low" or not torch.is_grad_enabled():
            return self._block(layer, hidden_NC, cos, sin, plan)
        if not hidden_NC.requires_grad and not any(
            p is not None for g in (layer.qkv, layer.output, layer.gate_up, layer.down) for p in g.parameters()
        ):
            return self._block(layer, hidden_NC, cos, sin, plan)
        with _offloaded(hidden_NC.shape):
            return checkpoint(self._block, layer, hidden_NC, cos, sin, plan, use_reentrant=False)

    def _block(self, layer: _Layer, hidden_NC: Tensor, cos: Tensor, sin: Tensor, plan: SegmentPlan) -> Tensor:
        query, key, value = NormQKV.apply(
            hidden_NC, layer.attention_norm, layer.qkv, cos, sin, self.heads, *layer.qkv.parameters()
        )
        attended = packed_attention(query, key, value, plan, self.scale).flatten(1)
        hidden_NC = OutputResidual.apply(attended, hidden_NC, layer.output, *layer.output.parameters())
        parameters = (*layer.gate_up.parameters(), *layer.down.parameters())
        keep = self.activation_memory == "full"
        return NormMLPResidual.apply(hidden_NC, layer.mlp_norm, layer.gate_up, layer.down, keep, CHUNK, *parameters)


def decoder_for(
    model: Any, kernels: str, activation_memory: ActivationMemory, device: torch.device
) -> tuple[Decoder, str]:
    """Chooses the path of a model's forward and backward pass.

    Args:
        model: a causal LM, as it is or wrapped by PEFT.
        kernels: ``auto``, ``fast`` or ``plain``.
        activation_memory: see the module's docstring.
        device: where the model is.

    Returns:
        The decoder, and one line that says which it is and why.

    Raises:
        UserError: ``fast`` was asked for and can't be had.
    """
    if kernels == "plain":
        return Decoder(model), "plain path: backbone.kernels is plain"
    try:
        fast = FastDecoder(model, activation_memory)
        if device.type not in ("cuda", "cpu"):
            raise NotImplementedError(f"the device is {device.type}")
        if device.type == "cuda" and fast.dtype not in (torch.bfloat16, torch.float16):
            raise NotImplementedError(f"its attention kernels take 16-bit numbers, the model is {fast.dtype}")
    except NotImplementedError as error:
        if kernels == "fast":
            raise UserError(f"backbone.kernels fast: {error}; set it to auto or plain") from error
        return Decoder(model), f"plain path: {error}"
    return fast, f"fast path: fused {fast.config.model_type} blocks, activation_memory {activation_memory}"


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
