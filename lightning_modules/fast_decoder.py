"""The fast path: a Llama or Mistral decoder run block by fused block, over packed rows.

``activation_memory`` trades memory for time. A layer of a 7B model keeps, a token:

- ``full``: 94 KB; nothing expensive is computed twice;
- ``balanced``: 37 KB; gate and up (57 KB) are computed again in the backward pass, 1.3 times the forward's work;
- ``low``: 8 KB, held in host memory; whole layers are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_modules.fast_lora import Group, Norm, NormMLPResidual, NormQKV, OutputResidual, Projection
from lightning_modules.packed_attention import SegmentPlan, packed_attention

ActivationMemory = Literal["full", "balanced", "low"]
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


class FastDecoder:
    """Runs a Hugging Face decoder's blocks by :mod:`lightning_modules.fast_lora`'s fused functions.

    Args:
        model: a causal LM, as it is or wrapped by PEFT; it keeps owning every parameter.
        activation_memory: see the module's docstring.

    Raises:
        NotImplementedError: the model has something that the fused functions do not compute; the message says what.
    """

    def __init__(self, model: Any, activation_memory: ActivationMemory = "full") -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config
        if config.model_type not in MODEL_TYPES:
            raise NotImplementedError(f"the architecture is {config.model_type}, not one of {', '.join(MODEL_TYPES)}")
        if config.hidden_act != "silu":
            raise NotImplementedError(f"the MLP's activation is {config.hidden_act}, not silu")
        self.decoder = base.model
        if any(parameter.requires_grad for parameter in self.decoder.embed_tokens.parameters()):
            raise NotImplementedError("the embeddings are trained")
        self.activation_memory = activation_memory
        self.window = getattr(config, "sliding_window", None)
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.scale = self.decoder.layers[0].self_attn.scaling
        self.layers = [_Layer.of(layer, activation_memory != "low") for layer in self.decoder.layers]

    def __call__(self, input_ids_BT: Tensor, position_ids_BT: Tensor, plan: SegmentPlan) -> Tensor:
        """Computes the hidden states [B, T, C] before the final norm.

        Raises:
            ValueError: an example is longer than the model's attention window.
        """
        if self.window is not None and plan.longest + max((p.length for p in plan.prefixes), default=0) > self.window:
            raise ValueError(f"an example is longer than the model's attention window of {self.window} tokens")
        embedded_BTC = self.decoder.embed_tokens(input_ids_BT)
        cos, sin = (x.flatten(0, 1) for x in self.decoder.rotary_emb(embedded_BTC, position_ids_BT))
        hidden_NC = embedded_BTC.flatten(0, 1)
        for layer in self.layers:
            hidden_NC = self._run(layer, hidden_NC, cos, sin, plan)
        return hidden_NC.view_as(embedded_BTC)

    def _run(self, layer: _Layer, hidden_NC: Tensor, cos: Tensor, sin: Tensor, plan: SegmentPlan) -> Tensor:
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
