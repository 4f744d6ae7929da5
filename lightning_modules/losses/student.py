"""The predictions of the model that is trained, and the sums of an empty batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.batch import Batch
from lightning_modules.losses.objectives import Objective
from lightning_modules.models.backend import Backend
from lightning_modules.models.decoder import Decoder, Predictions


def predict_student(
    decoder: Decoder,
    batch: Batch,
    positions_N: Tensor | None,
    layers: Sequence[str],
    projections: nn.ModuleList | None,
    backend: Backend,
) -> Predictions:
    """Computes hidden states at supervised positions, and the projected hidden states of layers that are matched.

    Args:
        decoder: runs the model.
        batch: the rows, on the device.
        positions_N: indices into the flattened rows; None for all.
        layers: names of the layers whose hidden states are matched with a teacher's.
        projections: maps to the teacher's width, one per layer; None for equal widths.
        backend: of the strategy.
    """
    if not layers:
        hidden_NC = decoder.hidden_states_at(batch, positions_N)
        return Predictions(hidden_NC, decoder.head, decoder.frozen_head, backend=backend)
    hidden_NC, states = decoder.hidden_states_of_layers(batch, positions_N, layers)
    states = [state.to(torch.promote_types(state.dtype, torch.float32)) for state in states]
    if projections is not None:
        states = [project(state) for project, state in zip(projections, states, strict=True)]
    return Predictions(hidden_NC, decoder.head, decoder.frozen_head, states, backend)


def zero_sums(objective: Objective, model: Any, decoder: Decoder, device: torch.device) -> dict[str, Tensor]:
    """Returns zeros under the names of an objective's sums, and ``count``, as for a batch without tokens.

    Args:
        objective: of the training module.
        model: the model that is trained.
        decoder: of that model.
        device: of the sums.
    """
    width = model.get_output_embeddings().weight.shape[1]
    empty = Predictions(torch.zeros(0, width, dtype=decoder.dtype, device=device), decoder.head)
    with torch.no_grad():
        sums = objective(empty, torch.zeros(0, dtype=torch.long, device=device), empty)
    return {**sums, "count": torch.zeros_like(sums["loss"])}
