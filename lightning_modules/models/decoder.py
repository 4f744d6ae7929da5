"""The plain forward pass of any Hugging Face causal LM over packed rows.

Shapes in names: B rows, T tokens a row, N supervised tokens, C channels, V vocabulary.

Logits are wanted at supervised positions only (some 30 % of a row), so the decoder and the head are called apart:
hidden states of all positions, then the head on some. This path works for every architecture, and is the reference that
the fast one is tested against.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.batch import Batch
from datamodules.errors import UserError
from lightning_modules.models.attention_masks import attention_mask
from lightning_modules.models.backend import DEFAULT_BACKEND, Backend, gather_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LAYER_TYPES = {"full_attention", "sliding_attention"}


class Decoder:
    """A view of a causal LM as decoder and head; holds nothing of its own.

    Args:
        model: a causal LM, as it is or wrapped by PEFT.

    Raises:
        UserError: some layers can't be told where a packed example ends (state-space, linear or chunked attention).
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
        """Type of the hidden states: that of the embeddings, whatever type the adapter has."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Computes in the base's half-precision type where the adapter's weights are float32."""
        if self.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self.model.get_input_embeddings().weight.device.type, dtype=self.dtype)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Computes the last hidden states [B, T, C], behind the final norm."""
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
        """Computes the last hidden states [N, C] of some positions of the flattened rows, of all where None."""
        return gather_positions(self.hidden_states(batch).flatten(0, 1), positions_N)

    def hidden_states_of_layers(
        self, batch: Batch, positions_N: Tensor | None, names: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """The same, and the outputs [N, C] of named layers (``layers.3``: the fourth block, before any final norm).

        Raises:
            UserError: there is no layer of a name.
        """
        blocks = {n: m for n, m in self.model.get_decoder().named_modules() if n.rpartition(".")[2].isdigit()}
        check_names(names, list(blocks))
        found: dict[str, Tensor] = {}

        def watching(name: str) -> Callable[..., None]:
            def watch(module: Any, inputs: Any, output: Any) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output

            return watch

        handles = [blocks[name].register_forward_hook(watching(name)) for name in names]
        try:
            hidden_NC = self.hidden_states_at(batch, positions_N)
        finally:
            for handle in handles:
                handle.remove()
        # not in the hooks: a checkpointed layer that is computed again would lack them
        return hidden_NC, [gather_positions(found[name].flatten(0, 1), positions_N) for name in names]

    def head(self, hidden_NC: Tensor) -> Tensor:
        """Computes logits [N, V] in float32 (float64 where the model is), scaled and capped as the model does it."""
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
        """Whether no parameter of the head is trained."""
        return not any(parameter.requires_grad for parameter in self.model.get_output_embeddings().parameters())

    def _mask(self, batch: Batch) -> Any:
        """The mask, or one a layer type where rows are longer than the window of some layers."""
        window = getattr(self.config, "sliding_window", None)
        if window is not None and batch.input_ids_BT.shape[1] <= window:
            window = None

        def mask(window: int | None) -> Any:
            return attention_mask(batch, self.config._attn_implementation, self.dtype, window)

        if window is None or self._layer_types == {"full_attention"}:
            return mask(None)
        if self._layer_types == _LAYER_TYPES:
            return {"full_attention": mask(None), "sliding_attention": mask(window)}
        return mask(window)


def check_names(names: Sequence[str], layers: Sequence[str]) -> None:
    """Refuses names of layers that a model does not have.

    Raises:
        UserError: one of them.
    """
    for name in names:
        if name not in layers:
            raise UserError(f"objective.hidden.layers: no layer {name}; the model has {layers[0]} to {layers[-1]}")


@dataclass(frozen=True)
class Predictions:
    """Hidden states at supervised positions and the head that makes logits of them, a chunk at a time.

    Attributes:
        hidden_NC: hidden states of the supervised positions.
        head: hidden states [n, C] -> logits [n, V] in float32 or float64.
        frozen_head: whether the head has no parameter that wants a gradient.
        states: hidden states [N, C] of the layers that an objective compares, the student's as its projection left it.
        backend: how they are cut into chunks, and what recomputes one.
    """

    hidden_NC: Tensor
    head: Callable[[Tensor], Tensor]
    frozen_head: bool = False
    states: Sequence[Tensor] = ()
    backend: Backend = DEFAULT_BACKEND
