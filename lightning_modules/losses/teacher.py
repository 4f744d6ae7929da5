"""A frozen model that another learns from.

It is no part of the module that trains: not in its parameters, not in its checkpoints, never in training mode.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from datamodules.batch import Batch
from datamodules.errors import UserError
from datamodules.pretrained.locate import loading_error
from lightning_modules.models.backbone import RANDOM, Backbone
from lightning_modules.models.decoder import Decoder, Predictions
from lightning_modules.models.fused_decoder import FusedDecoder, build_decoder


class Teacher:
    """Predicts without gradient and dropout.

    Args:
        model: the causal LM; it is frozen and put in evaluation mode.
        recipe: of the model; its kernels and fp8 are heeded.
        decoder: runs the model, where one that shares a student's weights is there; else one is made.
    """

    def __init__(self, model: nn.Module, recipe: Backbone, decoder: Decoder | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        device = next(model.parameters()).device
        self.decoder = decoder or build_decoder(model, recipe.kernels, "none", device, recipe.fp8)[0]

    @torch.no_grad()
    def predict(self, batch: Batch, positions_N: Tensor | None, layers: Sequence[str] = ()) -> Predictions:
        """Computes the hidden states at the given positions of the flattened rows, and those of named layers."""
        if self.decoder.model.device != batch.input_ids_BT.device:
            self.model.to(batch.input_ids_BT.device)
        if not layers:
            return Predictions(self.decoder.hidden_states_at(batch, positions_N), self.decoder.head)
        hidden_NC, states = self.decoder.hidden_states_of_layers(batch, positions_N, layers)
        return Predictions(hidden_NC, self.decoder.head, states=states)


def build_teacher(
    recipe: Backbone | Literal["base"],
    student: Backbone,
    model: nn.Module,
    device: torch.device,
    decoder: Decoder | None = None,
) -> Teacher:
    """Builds a teacher, on the student's own base where it can.

    Args:
        recipe: another model, another adapter on the student's base, or ``base``: the student without its adapter.
        student: recipe of the model that is trained.
        model: that model.
        device: where another model's weights go.
        decoder: of that model; a fast one lends its weights, in whatever form they are, to the base as a teacher.

    Raises:
        UserError: the student has no adapter to switch off, the tokenizers differ, or the recipe can't be built.
    """
    shared = recipe == "base" or (recipe.adapter is not None and recipe.shares_weights_with(student))
    if shared and student.lora is None and student.adapter is None:
        raise UserError(
            "objective.teacher shares the student's base, but backbone.lora is null, so the base itself is trained; "
            "set backbone.lora, or name another model as the teacher"
        )
    if recipe == "base":
        base = decoder.without_adapter() if isinstance(decoder, FusedDecoder) else None
        return Teacher(base_model_view(model), student, base)
    if shared:
        return Teacher(replace(recipe, lora=None).wrap(base_model_view(model)), replace(student, fp8=recipe.fp8))
    check_same_tokenizer(student, recipe)
    return Teacher(recipe.build(device), recipe)


def widths(student: Backbone, teacher: Backbone | Literal["base"]) -> tuple[int, int]:
    """Channels of both models' hidden states, by their configs."""
    from transformers import AutoConfig

    def width(backbone: Backbone) -> int:
        try:
            config = AutoConfig.from_pretrained(backbone.location, revision=backbone.revision or "main")
        except (OSError, ValueError) as error:
            raise loading_error("model", backbone.model_name_or_path, error) from error
        return int(config.get_text_config().hidden_size)

    own = width(student)
    shared = teacher == "base" or teacher.shares_weights_with(student)
    return own, own if shared or teacher == "base" else width(teacher)


def base_model_view(model: nn.Module) -> Any:
    """A second view of a model's weights without its adapter.

    The modules are new, so that they have a mode of their own and can carry another adapter; parameters are the same
    objects, so that no memory is taken and nothing has to be switched back and forth within a step.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def view(module: nn.Module) -> nn.Module:
        if isinstance(module, BaseTunerLayer):
            module = cast(nn.Module, module.get_base_layer())
        twin = copy.copy(module)
        for name in ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
            setattr(twin, name, copy.copy(getattr(module, name)))
        twin.__dict__.pop("peft_config", None)  # PEFT's mark on a model that it wrapped
        twin._modules = {name: None if child is None else view(child) for name, child in module._modules.items()}
        return twin

    return view(cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model)


def check_same_tokenizer(student: Backbone, teacher: Backbone) -> None:
    """Refuses a teacher whose token ids mean something else; random weights have no tokenizer and pass.

    Raises:
        UserError: the vocabularies differ; it says in what.
    """
    from datamodules.tokenization.chat_format import load_tokenizer

    if student.model_name_or_path == teacher.model_name_or_path or any(
        name.startswith(RANDOM) for name in (student.model_name_or_path, teacher.model_name_or_path)
    ):
        return
    ours, theirs = (load_tokenizer(b.model_name_or_path, b.revision).get_vocab() for b in (student, teacher))
    if ours == theirs:
        return
    differing = sorted((ids, token) for token, ids in ours.items() if theirs.get(token) != ids)
    detail = f"{len(ours):,} tokens against {len(theirs):,}"
    if differing:
        ids, token = differing[0]
        detail += f"; {len(differing):,} of the student's are elsewhere or absent, the first is {token!r} (id {ids})"
    raise UserError(
        f"objective.teacher {teacher.model_name_or_path}: its tokenizer differs from that of "
        f"{student.model_name_or_path}: {detail}; "
        "choose a teacher of the same family, or teacher base"
    )
