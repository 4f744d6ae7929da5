"""The frozen teacher of a distillation.

The teacher is not part of the training module: it is not in its parameters or checkpoints, and never in training mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from datamodules.batch import Batch
from datamodules.errors import UserError
from datamodules.pretrained.locate import loading_error
from lightning_modules.losses.objectives import Objective
from lightning_modules.models.backbone import RANDOM, Backbone
from lightning_modules.models.decoder import Decoder, Predictions
from lightning_modules.models.fused_decoder import FusedDecoder, build_decoder
from lightning_modules.models.module_view import module_view


class Teacher:
    """Predicts without gradients and dropout.

    Args:
        model: the causal LM. It is frozen and put in evaluation mode.
        backbone: description of the model, whose ``kernels`` and ``fp8`` are used.
        decoder: runs the model; None builds one. A decoder may share the weights of a student.
    """

    def __init__(self, model: nn.Module, backbone: Backbone, decoder: Decoder | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        device = next(model.parameters()).device
        self.decoder = decoder or build_decoder(model, backbone.kernels, "none", device, backbone.fp8)[0]

    @torch.no_grad()
    def predict(self, batch: Batch, positions_N: Tensor | None, layers: Sequence[str] = ()) -> Predictions:
        """Computes the hidden states at positions of the flattened rows.

        Args:
            batch: the rows, on the device.
            positions_N: indices into the flattened rows; None for all.
            layers: names of layers whose hidden states are also wanted.
        """
        if self.decoder.model.device != batch.input_ids_BT.device:
            self.model.to(batch.input_ids_BT.device)
        if not layers:
            return Predictions(self.decoder.hidden_states_at(batch, positions_N), self.decoder.head)
        hidden_NC, states = self.decoder.hidden_states_of_layers(batch, positions_N, layers)
        return Predictions(hidden_NC, self.decoder.head, states=states)


def build_teacher(
    teacher: Backbone | Literal["base"],
    student: Backbone,
    model: nn.Module,
    device: torch.device,
    decoder: Decoder | None = None,
) -> Teacher:
    """Builds a teacher, on the student's own base if it can share it.

    Args:
        teacher: another model, another adapter on the student's base, or ``base``: the student without its adapter.
        student: description of the model that is trained.
        model: that model.
        device: device of the weights of another model.
        decoder: of that model. A teacher that is the base shares the weights of a fused decoder, also in FP8.

    Raises:
        UserError: the student has no adapter to leave out, the tokenizers differ, or the teacher can't be built.
    """
    shared = teacher == "base" or (teacher.adapter is not None and teacher.shares_weights_with(student))
    if shared and student.lora is None and student.adapter is None:
        raise UserError(
            "objective.teacher shares the student's base, but backbone.lora is null, so the base itself is trained; "
            "set backbone.lora, or name another model as the teacher"
        )
    if teacher == "base":
        base = decoder.without_adapter() if isinstance(decoder, FusedDecoder) else None
        return Teacher(base_model_view(model), student, base)
    if shared:
        return Teacher(replace(teacher, lora=None).wrap(base_model_view(model)), replace(student, fp8=teacher.fp8))
    check_same_tokenizer(student, teacher)
    return Teacher(teacher.build(device), teacher)


def build_projections(objective: Objective, student: Backbone, device: torch.device) -> nn.ModuleList | None:
    """Builds linear maps from the student's hidden states to the width of the teacher's, one per matched layer.

    Returns:
        The maps in float32, initialised as truncated identities; None if no layer is matched or the widths are equal.
    """
    teacher = objective.teacher_backbone
    if teacher is None or not objective.layers:
        return None
    own, other = hidden_widths(student, teacher)
    if own == other:
        return None
    maps = [nn.Linear(own, other, bias=False, dtype=torch.float32, device=device) for _ in objective.layers]
    for linear in maps:
        nn.init.eye_(linear.weight)
    return nn.ModuleList(maps)


def hidden_widths(student: Backbone, teacher: Backbone | Literal["base"]) -> tuple[int, int]:
    """Returns the number of channels of both models' hidden states, from their configs."""
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
    """Returns a second view of a model's weights, without its adapter.

    The modules are new, so they have a training mode of their own and can have another adapter. The parameters are the
    same objects, so the view takes no memory, and no adapter has to be disabled and enabled within a step.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def unwrap(module: nn.Module) -> nn.Module:
        return cast(nn.Module, module.get_base_layer()) if isinstance(module, BaseTunerLayer) else module

    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    view = module_view(base, unwrap=unwrap)
    for module in view.modules():
        module.__dict__.pop("peft_config", None)  # PEFT sets it on a model that it has wrapped
    return view


def check_same_tokenizer(student: Backbone, teacher: Backbone) -> None:
    """Refuses a teacher whose token ids have other meanings; models of random weights have no tokenizer and pass.

    Raises:
        UserError: the vocabularies differ; the message names the first difference.
    """
    from datamodules.tokenization.chat_format import load_tokenizer

    if student.model_name_or_path == teacher.model_name_or_path or any(
        name.startswith(RANDOM) for name in (student.model_name_or_path, teacher.model_name_or_path)
    ):
        return
    own, other = (load_tokenizer(b.model_name_or_path, b.revision).get_vocab() for b in (student, teacher))
    if own == other:
        return
    differing = sorted((ids, token) for token, ids in own.items() if other.get(token) != ids)
    detail = f"{len(own):,} tokens against {len(other):,}"
    if differing:
        ids, token = differing[0]
        detail += f"; {len(differing):,} of the student's are elsewhere or absent, the first is {token!r} (id {ids})"
    raise UserError(
        f"objective.teacher {teacher.model_name_or_path}: its tokenizer differs from that of "
        f"{student.model_name_or_path}: {detail}. Fix: choose a teacher of the same family, or set teacher to base"
    )
