"""From batches to a loss, and from a model to answers."""

from lightning_modules.backbone import Backbone, LoRA
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.objectives import CompletionCrossEntropy, Distillation, Objective

__all__ = ["Backbone", "CausalLMModule", "CompletionCrossEntropy", "Distillation", "LoRA", "Objective"]
