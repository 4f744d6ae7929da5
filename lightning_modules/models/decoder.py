"""The eager forward pass of any Hugging Face causal LM over packed rows.

Shapes in names: B rows, T tokens per row, N supervised tokens, C channels, V vocabulary.

Logits are needed at supervised positions only (about 30 % of a row), so decoder and head are called separately: the
decoder on all positions, then the head on some. This path supports every architecture, and is the reference in the
tests of the fused kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.batch import Batch
from datamodules.errors import UserError
from lightning_modules.models.attention_masks import attention_mask, attn_implementation
from lightning_modules.models.backend import DEFAULT_BACKEND, Backend, gather_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LAYER_TYPES = {"full_attention", "sliding_attention"}


class Decoder:
    """A view of a causal LM as decoder and head, without parameters of its own.

    Args:
        model: a causal LM, with or without PEFT's wrapper.

    Raises:
        UserError: some layers do not accept the ends of packed examples (state-space, linear or chunked attention).
    """

    def __init__(self, model: Any) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.model.config.get_text_config()
        self._layer_types = set(getattr(self.config, "layer_types", None) or ())
        if unknown := self._layer_types - _LAYER_TYPES:
            name = self.config.name_or_path or self.config.model_type
            raise UserError(
                f"model {name}: layers of type {', '.join(sorted(unknown))} "
                "would mix the examples of a packed row; choose a model with full or sliding attention"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states, which is that of the embeddings; the adapter may have another one."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns a context that computes in the half-precision dtype of the base if the adapter is in float32."""
        if self.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self.model.get_input_embeddings().weight.device.type, dtype=self.dtype)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Computes the last hidden states [B, T, C], after the final norm."""
        with self.autocast():
            output = self.model.get_decoder()(
                input_ids=batch.input_ids_BT,
                position_ids=batch.position_ids_BT,
                attention_mask=self._mask(batch),
                use_cache=False,
            )
        hidden_BTC: Tensor = output.last_hidden_state
        return hidden_BTC

    def hidden_states_at(self, batch: Batch, positions_N: Tensor | None) -> Tensor:
        """Computes the last hidden states [N, C] at some positions of the flattened rows; None for all positions."""
        return gather_positions(self.hidden_states(batch).flatten(0, 1), positions_N)

    def hidden_states_of_layers(
        self, batch: Batch, positions_N: Tensor | None, names: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes the same, and the outputs [N, C] of the given layers, before the final norm.

        Args:
            batch: packed rows.
            positions_N: of the flattened rows; None for all.
            names: of layers, such as ``layers.3`` for the fourth block.

        Raises:
            UserError: the model has no layer of a name.
        """
        blocks = {n: m for n, m in self.model.get_decoder().named_modules() if n.rpartition(".")[2].isdigit()}
        check_names(names, list(blocks))
        outputs: dict[str, Tensor] = {}

        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                outputs[name] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [blocks[name].register_forward_hook(hook_for(name)) for name in names]
        try:
            hidden_NC = self.hidden_states_at(batch, positions_N)
        finally:
            for handle in handles:
                handle.remove()
        # not in the hooks, which do not run when a checkpointed layer is recomputed
        return hidden_NC, [gather_positions(outputs[name].flatten(0, 1), positions_N) for name in names]

    def head(self, hidden_NC: Tensor) -> Tensor:
        """Computes logits [N, V] in float32 (float64 for a float64 model), with the scale and cap of the model."""
        with self.autocast():
            logits_NV: Tensor = self.model.get_output_embeddings()(hidden_NC)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        config = self.config
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits_NV = logits_NV * scale
        if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits_NV = logits_NV / scaling
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits_NV = cap * torch.tanh(logits_NV / cap)
        return logits_NV

    @property
    def frozen_head(self) -> bool:
        """Whether the head has no trainable parameter."""
        return not any(parameter.requires_grad for parameter in self.model.get_output_embeddings().parameters())

    def _mask(self, batch: Batch) -> Any:
        """Builds the mask, or one per layer type if rows are longer than the window of some layers."""
        window = getattr(self.config, "sliding_window", None)
        if window is not None and batch.input_ids_BT.shape[1] <= window:
            window = None

        def mask(window: int | None) -> Any:
            return attention_mask(batch, attn_implementation(self.config), self.dtype, window)

        if window is None or self._layer_types == {"full_attention"}:
            return mask(None)
        if self._layer_types == _LAYER_TYPES:
            return {"full_attention": mask(None), "sliding_attention": mask(window)}
        return mask(window)


def check_names(names: Sequence[str], layers: Sequence[str]) -> None:
    """Raises an error if the model does not have a layer of one of the names.

    Raises:
        UserError: no such layer.
    """
    for name in names:
        if name not in layers:
            known = f"the model has {layers[0]} to {layers[-1]}"
            raise UserError(f"objective.hidden.layers: no layer {name}; {known}. Fix: name one of them")


@dataclass(frozen=True)
class Predictions:
    """Hidden states at supervised positions, and the head that computes their logits chunk by chunk.

    Attributes:
        hidden_NC: hidden states of the supervised positions.
        head: hidden states [n, C] -> logits [n, V] in float32 or float64.
        frozen_head: whether the head has no trainable parameter.
        states: hidden states [N, C] of the layers that an objective compares; those of a student are projected.
        backend: splits them into chunks and recomputes a chunk.
    """

    hidden_NC: Tensor
    head: Callable[[Tensor], Tensor]
    frozen_head: bool = False
    states: Sequence[Tensor] = ()
    backend: Backend = DEFAULT_BACKEND
