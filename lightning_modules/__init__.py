"""From batches to a loss, and from a model to answers."""

from lightning_modules.backbone import Backbone, LoRA
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.objectives import CompletionCrossEntropy, Distillation, HiddenMatch, Objective
from lightning_modules.teacher_cache import TeacherCache

__all__ = [
    "Backbone", "CausalLMModule", "CompletionCrossEntropy", "Distillation", "HiddenMatch", "LoRA", "Objective",
    "TeacherCache",
]  # fmt: skip
