"""A small cache of a teacher's predictions with known targets."""

import json

import numpy as np

from datamodules.tokenization.chat_format import Example
from lightning_modules.losses.teacher_cache import digest
from lightning_modules.losses.teacher_shards import save_shard

V = 41  #: vocabulary


def example(key, prompt, completion, prefix=3, task="risk"):
    ids = np.random.default_rng(key).integers(5, V, prompt + completion).astype(np.int32)
    ids[:prefix] = np.arange(prefix)
    return Example(task, prefix, ids[:prompt], ids[prompt:], key, key, "info", "", 1)


def arrays_of(examples, k=4):
    """Returns targets whose ids are the token to predict, and whose numbers differ between positions."""
    ends = np.cumsum([len(e.completion_ids) for e in examples])
    ids = np.concatenate([e.completion_ids for e in examples]).astype(np.uint16)
    noise = np.random.default_rng(0).standard_normal((int(ends[-1]), k))
    return {
        "keys": np.array([e.key for e in examples], np.uint64), "ends": ends,
        "ids": np.stack([ids] * k, 1), "log_probs": noise.astype(np.float16), "tails": noise[:, :2].astype(np.float16),
    }  # fmt: skip


EXAMPLES = [example(2**63 + 7 * n, 5 + n % 4, 1 + 5 * n % 8) for n in range(12)]
KEY = {"version": 1, "tokenizer": "a", "data": {"seed": 0, "task_weights": {"risk": 1.0}}, "top_k": 4}
RECORD = {**KEY, "vocabulary": V, "temperatures": [1.0, 2.0]}


def write_cache(folder):
    """Writes a finished cache of EXAMPLES in two shards; returns the folder."""
    (folder / "key.json").write_text(json.dumps(RECORD))
    names = []
    for number, part in enumerate((EXAMPLES[:5], EXAMPLES[5:])):
        names.append(f"train-{number:05}.safetensors")
        save_shard(folder / names[-1], arrays_of(part), digest(RECORD))
    (folder / "done.json").write_text(json.dumps({"rows": 10, "shards": names}))
    return folder
