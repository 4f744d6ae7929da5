"""The training module, its models and objectives, and generation, evaluation and export of the trained model."""

from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.losses.objectives import CompletionCrossEntropy, Distillation, HiddenMatch, Objective
from lightning_modules.losses.teacher_cache import TeacherCache
from lightning_modules.models.backbone import Backbone, LoRA

__all__ = [
    "Backbone", "CausalLMModule", "CompletionCrossEntropy", "Distillation", "HiddenMatch", "LoRA", "Objective",
    "TeacherCache",
]  # fmt: skip
