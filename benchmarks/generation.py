"""Measures how many findings per second a model answers.

    python benchmarks/generation.py              # Mistral-7B shapes in NF4 with random weights, one GPU
    python benchmarks/generation.py --model embedded:smollm2-135m-instruct --quantization none --dtype float32 \
        --device cpu --findings 16 --slots 16 --variants merged

Random weights never end an answer, so every answer is cut at ``--answer`` tokens; the speed does not depend on the
generated tokens. Prompts are random tokens after a common prefix, as long as those of the risk task (Mistral's
tokenizer, real shards: about 150 tokens of instruction, 130 of finding, 95 of answer). The model has an adapter of rank
64 on all seven projections, as after training. ``--tokenizer FOLDER`` adds a variant whose answers are constrained by
the grammar of the risk schema.

Each variant answers ``--findings`` prompts twice in a process of its own, and the second time is reported (kernels and
graphs of the first are not kept, but libraries are loaded then).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

#: name -> (a merged copy, CUDA graphs, a grammar)
VARIANTS = {
    "merged": (True, True, False),
    "merged, grammar": (True, True, True),
    "merged, no graphs": (True, False, False),
    "layers as trained": (False, True, False),
    "layers as trained, no graphs": (False, False, False),
}


class Prompts:
    """Replaces a chat format: prompts of given lengths, of random tokens after a common prefix."""

    def __init__(self, vocabulary: int, prefix: int, finding: int, seed: int = 0) -> None:
        import numpy as np

        self._random, self._vocabulary, self._finding = np.random.default_rng(seed), vocabulary, finding
        self._prefix = self._ids(prefix)
        self.eos_id = -1  # not a token: every answer has the full length

    def _ids(self, count: int) -> list[int]:
        return self._random.integers(5, self._vocabulary, count).tolist()

    def prefix_ids(self, task: Any) -> list[int]:
        """Returns the prefix."""
        return list(self._prefix)

    def prompt_ids(self, task: Any, contents: list[str]) -> list[list[int]]:
        """Returns one prompt per content; the lengths of findings differ by up to a quarter from the mean."""
        spread = self._random.uniform(0.75, 1.25, len(contents))
        return [[*self._prefix, *self._ids(int(self._finding * part))] for part in spread]

    def decode(self, ids: list[int]) -> str:
        """Returns no text."""
        return ""


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Answers all findings twice and returns the figures of the second time."""
    import torch

    from lightning_modules import Backbone, LoRA
    from lightning_modules.generation import kv_cache, merged_weights
    from lightning_modules.generation.engine import generate

    one_copy, graphs, grammar = VARIANTS[name]
    merged_weights.MEMORY_SHARE = merged_weights.MEMORY_SHARE if one_copy else 0.0
    kv_cache.WARMUP_STEPS = kv_cache.WARMUP_STEPS if graphs else 1 << 30
    steps = _count_steps(kv_cache.SlotKVCache)
    lora = LoRA(options.rank, 2 * options.rank) if options.rank else None
    backbone = Backbone(options.model, options.quantization, options.dtype, lora=lora)
    model = backbone.build(options.device).requires_grad_(False)
    chat = Prompts(model.config.vocab_size, options.prefix, options.finding)
    constraint, times = _grammar(options.tokenizer) if grammar else None, []
    for _ in range(2):
        steps.clear()
        _synchronize(options.device)
        start = time.perf_counter()
        generate(
            model, chat, SimpleNamespace(name="risk"), [""] * options.findings, max_new_tokens=options.answer,  # type: ignore[arg-type]
            batch_size=options.slots, constraint=constraint,
        )  # fmt: skip
        _synchronize(options.device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device.startswith("cuda") else float("nan")
    return {
        "variant": name,
        "findings_s": options.findings / times[1],
        "tokens_s": options.findings * options.answer / times[1],
        "ms_step": 1000 * sum(steps) / len(steps),
        "share_of_steps": sum(steps) / times[1],
        "seconds": times[1],
        "first_seconds": times[0],
        "peak_gib": peak,
    }


def _count_steps(kind: Any) -> list[float]:
    """Measures the time of every step on the host's clock: a step ends when its tokens are on the host."""
    seconds: list[float] = []
    step = kind.step

    def timed(self: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = step(self, *arguments)
        seconds.append(time.perf_counter() - start)
        return result

    kind.step = timed
    return seconds


def _grammar(tokenizer: str) -> Any:
    from datamodules.tasks.schemas import RISK
    from datamodules.tokenization.chat_format import ChatFormat, load_tokenizer
    from lightning_modules.generation.constrained_decoding import JsonGrammar

    chat = ChatFormat(load_tokenizer(tokenizer))
    return JsonGrammar(chat.tokenizer, chat.eos_id, RISK)


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Parses the command line, runs each variant in a process of its own and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=f"random:{ROOT / 'benchmarks' / 'mistral-7b'}")
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "int8", "none"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=int, default=64, help="rank of the adapter; 0 is no adapter")
    parser.add_argument("--findings", type=int, default=256)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--prefix", type=int, default=150)
    parser.add_argument("--finding", type=int, default=130, help="tokens of a prompt after the prefix, on average")
    parser.add_argument("--answer", type=int, default=95)
    parser.add_argument("--tokenizer", help="folder of a tokenizer, for the variant with a grammar")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--output", help="JSON file for all figures")
    options = parser.parse_args()
    if options.child is not None:
        print("RESULT " + json.dumps(measure(options.child, options)))
        return
    names = options.variants or [name for name, (_, _, grammar) in VARIANTS.items() if options.tokenizer or not grammar]
    if any(VARIANTS[name][2] for name in names) and not options.tokenizer:
        parser.error("a variant with a grammar needs --tokenizer FOLDER")
    report([_child(name) for name in names], options)


def _child(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            print(f"{name}: {result['findings_s']:.1f} findings/s", flush=True)
            return result
    print(f"no result from {name}\n{done.stderr[-2500:]}", flush=True)
    return {"variant": name}


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints the table, and writes the figures if asked."""
    lora = f"LoRA r={options.rank}" if options.rank else "no adapter"
    print(
        f"\n{Path(options.model).name}, {options.quantization}, {lora}: {options.findings} findings, "
        f"{options.slots} slots, prompts of {options.prefix} + {options.finding} tokens, answers of {options.answer}"
    )
    keys = ["findings_s", "tokens_s", "ms_step", "share_of_steps", "seconds", "first_seconds", "peak_gib"]
    print("| variant | " + " | ".join(key.replace("_", " ") for key in keys) + " |")
    print("|---" * (len(keys) + 1) + "|")
    for row in rows:
        print("| " + " | ".join([row["variant"], *(f"{row[key]:,.2f}" if key in row else "" for key in keys)]) + " |")
    if options.output:
        Path(options.output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
