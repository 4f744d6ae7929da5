"""A chat format of bytes, a tiny model that answers in it, and a plain forward pass as the reference."""

from types import SimpleNamespace

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

CONTENTS = ["a", "an open port 4444", "x" * 41, "suid binary", "", "world writable /tmp/x", "cron"]
TASK = SimpleNamespace(name="risk", answer_schema={"type": "object"})


class Bytes:
    """A chat format of bytes: ids 5 + byte, BOS 1, and prompts that begin with the same instruction.

    Attributes:
        encoded: number of contents whose prompt was encoded.
    """

    pad_id, bos_id = 0, 1

    def __init__(self, prefix="Assess this.\n", eos_id=2):
        self.prefix, self.eos_id, self.encoded = prefix, eos_id, 0

    def ids(self, text):
        return [5 + byte % 250 for byte in text.encode()]

    def prefix_ids(self, task):
        return [1, *self.ids(self.prefix)] if self.prefix else []

    def prompt_ids(self, task, contents):
        self.encoded += sum(map(bool, contents))
        return [[*self.prefix_ids(task), *self.ids(content), 4] for content in contents]

    def encode(self, task, pairs):
        prompts = self.prompt_ids(task, [pair.content for pair in pairs])
        return [
            SimpleNamespace(
                prompt_ids=np.array(prompt, np.int32), completion_ids=np.array([*self.ids(p.completion), self.eos_id])
            )
            for prompt, p in zip(prompts, pairs, strict=True)
        ]

    def decode(self, ids):
        return " ".join(map(str, ids))


class AllowedTokens:
    """A constraint that allows a given set of tokens at each step, independent of the tokens before.

    Attributes:
        seen: the tokens that each state has accepted.
    """

    def __init__(self, allowed):
        self.steps, self.seen = allowed, []

    def start(self):
        matcher = SimpleNamespace(tokens=[])
        matcher.accept = matcher.tokens.append
        self.seen.append(matcher.tokens)
        return matcher

    def allowed(self, matchers):
        bits = torch.full((len(matchers), 9), -1, dtype=torch.int64)
        for row, matcher in enumerate(matchers):
            if matcher is None:
                continue
            bits[row] = 0
            for token in self.steps[len(matcher.tokens)]:
                bits[row, token // 32] |= 1 << token % 32
        return bits.to(torch.int32)

    def accepts(self, tokens):
        count = 0
        while count < len(tokens) and tokens[count] in self.steps[count]:
            count += 1
        return count


def load(folder, adapter=False):
    """Loads a model in float32, with a random LoRA adapter if asked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if not adapter:
        return model
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def plain_logprob(model, prompt, completion):
    """Computes the log-probability of a completion with one forward pass, without a cache."""
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))


def one_by_one(model, chat, contents, limit):
    """Yields the tokens of model.generate for each prompt alone, and True if the model ended them."""
    for prompt in chat.prompt_ids(TASK, contents):
        ids = torch.tensor([prompt])
        new = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False,
            eos_token_id=chat.eos_id, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        stopped = new[-1] == chat.eos_id
        yield (new[:-1] if stopped else new), stopped


def end_that_occurs(model, limit):
    """Returns an id that the random model generates early in some answers, late in some and never in others."""
    answers = [tokens for tokens, _ in one_by_one(model, Bytes(eos_id=2), CONTENTS, limit)]
    ids = {token for tokens in answers for token in tokens}
    return min(ids, key=lambda token: (abs(sum(token in tokens for tokens in answers) - len(answers) // 2), token))
