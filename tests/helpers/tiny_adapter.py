"""A PEFT adapter with random weights on a tiny model."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "up_proj"]


def save_adapter(base, folder, *, rank=4, alpha=8, **options):
    """Writes an adapter with non-zero weights and returns the model of base and adapter in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()
