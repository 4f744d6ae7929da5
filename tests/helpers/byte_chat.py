"""A chat format of bytes, a tiny model to answer in it, and the plain forward pass that all is held against."""

from types import SimpleNamespace

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

CONTENTS = ["a", "an open port 4444", "x" * 41, "suid binary", "", "world writable /tmp/x", "cron"]
TASK = SimpleNamespace(name="risk")


class Bytes:
    """A chat format of bytes: ids 5 + byte, BOS 1, prompts that begin with the same instruction."""

    pad_id, bos_id = 0, 1

    def __init__(self, prefix="Assess this.\n", eos_id=2):
        self.prefix, self.eos_id = prefix, eos_id

    def ids(self, text):
        return [5 + byte % 250 for byte in text.encode()]

    def prefix_ids(self, task):
        return [1, *self.ids(self.prefix)] if self.prefix else []

    def prompt_ids(self, task, contents):
        return [[*self.prefix_ids(task), *self.ids(content), 4] for content in contents]

    def encode(self, task, pairs):
        prompts = self.prompt_ids(task, [pair.content for pair in pairs])
        return [
            SimpleNamespace(
                prompt_ids=np.array(prompt, np.int32), completion_ids=np.array([*self.ids(p.completion), self.eos_id])
            )
            for prompt, p in zip(prompts, pairs, strict=True)
        ]

    def decode(self, ids, task=None):
        return " ".join(map(str, ids))


def load(folder, adapter=False):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if not adapter:
        return model
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def plain_logprob(model, prompt, completion):
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))
