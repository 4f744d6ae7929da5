"""Measures the speed of a training step next to that of other trainers, in one run on one GPU.

    python benchmarks/train_step.py --tokens tokens.npz [--peers FOLDER] [--output table.json]

Mistral-7B shapes with random weights in NF4 (speed and memory do not depend on the values of the weights), LoRA r=64
on all seven projections, real token counts. Each variant runs in a process of its own; all variants run in turn,
``--repeats`` times. A peer is a script that takes a variant and a number of steps and prints one ``RESULT {json}`` line
with ``tok_s``, ``ms_step`` and ``peak_gib``.

``tokens.npz`` has tokenized examples: ``flat`` token ids of all, ``lp`` prompt lengths, ``lc`` completion lengths.

findings/s refer to an epoch over the file: computed tokens/s divided by the mean of computed tokens per finding, since
rows differ (one of 16,384 tokens has 29 to 56 findings) and few rows are a noisy sample. For a peer they are its
tokens/s divided by the mean length of an example.

Model FLOP use counts 4 N FLOP per computed token (N = 7.11e9 weights of the layers and the head: forward pass and
gradients of activations; frozen weights have no gradients), of the 989 TFLOP/s of a dense bf16 H100.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

WEIGHTS, PEAK_FLOPS = 7.11e9, 989e12
#: name -> (sequence_length, packing, kernels, activation_checkpointing, FP8 products)
VARIANTS = {
    "none, shared prefix, 16384": (16384, "shared_prefix", "fused", "none", False),
    "none, shared prefix, 8192": (8192, "shared_prefix", "fused", "none", False),
    "none, packed, 8192": (8192, "packed", "fused", "none", False),
    "selective, shared prefix, 16384": (16384, "shared_prefix", "fused", "selective", False),
    "full, shared prefix, 16384": (16384, "shared_prefix", "fused", "full", False),
    "offload, shared prefix, 16384": (16384, "shared_prefix", "fused", "offload", False),
    "FP8, shared prefix, 16384": (16384, "shared_prefix", "fused", "none", True),
    "eager, packed, 4096": (4096, "packed", "eager", "full", False),
    "eager, shared prefix, 4096": (4096, "shared_prefix", "eager", "full", False),
}
PEERS = {
    "TRL, original settings": ("peer_trl.py", "seed"),
    "TRL + Liger, packed": ("peer_trl.py", "pack"),
    "Unsloth, packed": ("peer_unsloth.py", "pack4_d0"),
}


def load_examples(file: str) -> list[Any]:
    """Reads the token file; examples with a common beginning form a task, and the beginning is its prefix."""
    import numpy as np

    from datamodules.tokenization.chat_format import Example

    with np.load(file) as arrays:
        flat, prompts, completions = arrays["flat"].astype(np.int32), arrays["lp"], arrays["lc"]
    bounds = np.concatenate([[0], np.cumsum(prompts + completions)])
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, start in enumerate(bounds[:-1]):
        groups.setdefault(tuple(flat[start + 120 : start + 150]), []).append(index)
    examples = []
    for task, members in enumerate(group for group in groups.values() if len(group) > 200):
        shortest = min(prompts[i] for i in members)
        starts = np.stack([flat[bounds[i] : bounds[i] + shortest] for i in members])
        same = (starts == starts[0]).all(0)
        prefix = int(shortest if same.all() else same.argmin())
        for i in members:
            ids = flat[bounds[i] : bounds[i + 1]]
            examples.append(Example(str(task), prefix, ids[: prompts[i]], ids[prompts[i] :], i, i, "info", "", 1))
    return examples


def measure(name: str, tokens: str, steps: int, warmup: int, profile: bool) -> dict[str, Any]:
    """Trains ``steps`` steps of a variant of this project and returns its figures."""
    from lightning_modules import Backbone, LoRA

    sequence_length, packing, kernels, checkpointing, fp8 = VARIANTS[name]
    backbone = Backbone(
        f"random:{ROOT / 'benchmarks' / 'mistral-7b'}", "nf4", "bfloat16", lora=LoRA(64, 128),
        kernels=kernels, activation_checkpointing=checkpointing, fp8=fp8,
    )  # fmt: skip
    return {"variant": name, **train(backbone, tokens, sequence_length, packing, steps, warmup, profile)}


def train(
    backbone: Any, tokens: str, sequence_length: int, packing: Any, steps: int, warmup: int, profile: bool = False
) -> dict[str, Any]:
    """Trains a model on rows of the token file and returns its figures."""
    import numpy as np
    import torch

    from datamodules.packing import length, pack, to_batch
    from lightning_modules import CausalLMModule, CompletionCrossEntropy
    from optimizers import Lion

    rows = pack(load_examples(tokens), sequence_length=sequence_length, mode=packing)
    per_finding = sum(row.tokens for row in rows) / sum(len(row.examples) for row in rows)
    np.random.default_rng(0).shuffle(rows)
    module = CausalLMModule(backbone, CompletionCrossEntropy(), partial(Lion, lr=5e-5))
    with torch.device("cuda"):
        module.configure_model()
    module.to("cuda").train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = Lion(parameters, lr=5e-5)
    torch.cuda.reset_peak_memory_stats()
    marks, losses, trained = [], [], []
    for row in rows[: steps + warmup]:
        batch = module.transfer_batch_to_device(to_batch([row], sequence_length), torch.device("cuda"), 0)
        sums = module.compute_sums(batch)
        sums["loss"].backward()
        torch._foreach_mul_([p.grad for p in parameters], 1 / sums["count"])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(sums["loss"].detach() / sums["count"])
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        trained.append(row)
    torch.cuda.synchronize()
    if profile:
        _profile(module, optimizer, batch)
    seconds = marks[warmup - 1].elapsed_time(marks[-1]) / 1000
    trained = trained[warmup:]
    computed = sum(row.tokens for row in trained)
    return {
        "findings_s": computed / seconds / per_finding,
        "computed_tokens_s": computed / seconds,
        "tokens_s": sum(length(e) for row in trained for e in row.examples) / seconds,
        "supervised_tokens_s": sum(len(e.completion_ids) for row in trained for e in row.examples) / seconds,
        "ms_step": 1000 * seconds / len(trained),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "flop_use": 4 * WEIGHTS * computed / seconds / PEAK_FLOPS,
        "loss": [round(float(losses[0]), 3), round(float(losses[-1]), 3)],
    }


def _profile(module: Any, optimizer: Any, batch: Any) -> None:
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as record:
        start = time.time()
        for _ in range(3):
            module.compute_sums(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        wall = time.time() - start
    busy = sum(event.self_device_time_total for event in record.key_averages()) / 1e6
    print(record.key_averages().table(sort_by="cuda_time_total", row_limit=36, max_name_column_width=76))
    print(f"GPU busy {busy / wall:.1%} of {wall / 3 * 1000:.0f} ms per step")


def run(command: list[str], cwd: Path, prefix: str = "RESULT ") -> dict[str, Any] | None:
    """Runs a variant in a process of its own and returns its result; None if it prints none."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(prefix):
            return json.loads(line.removeprefix(prefix))
    print(f"no result from {' '.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}", flush=True)
    return None


def compare(options: argparse.Namespace) -> None:
    """Runs every variant in turn and prints the medians."""
    runs: dict[str, list[dict[str, Any]]] = {}
    peers = {name: script for name, script in PEERS.items() if options.peers}
    for _ in range(options.repeats):
        for name in options.variants or [*VARIANTS, *peers]:
            if name in VARIANTS:
                command = [
                    sys.executable,
                    __file__,
                    "--child",
                    name,
                    "--tokens",
                    options.tokens,
                    "--steps",
                    str(options.steps),
                ]
                result = run(command, ROOT)
            else:
                script, variant = PEERS[name]
                result = run([sys.executable, script, variant, str(options.steps + 3)], Path(options.peers))
                mean = sum(map(_example_length, load_examples(options.tokens))) / len(load_examples(options.tokens))
                if result is not None:
                    result = {**result, "tokens_s": result["tok_s"], "findings_s": result["tok_s"] / mean}
            if result is not None:
                runs.setdefault(name, []).append(result)
                print(f"{name}: {json.dumps(result)}", flush=True)
    report(runs, options.output)


def _example_length(example: Any) -> int:
    return len(example.prompt_ids) + len(example.completion_ids)


def report(runs: dict[str, list[dict[str, Any]]], output: str | None) -> None:
    """Prints the table of medians over repeats, with the ratio to each peer."""
    keys = ["findings_s", "computed_tokens_s", "supervised_tokens_s", "ms_step", "peak_gib", "flop_use"]
    rows = {
        name: {key: statistics.median(r[key] for r in results if key in r) for key in keys if key in results[0]}
        for name, results in runs.items()
    }
    peers = [name for name in rows if name in PEERS]
    titles = ["variant", *(key.replace("_", " ") for key in keys), *(f"x {peer}" for peer in peers)]
    print("| " + " | ".join(titles) + " |")
    print("|---" * (7 + len(peers)) + "|")
    for name, row in rows.items():
        cells = [f"{row[key]:,.2f}" if key in row else "" for key in keys]
        ratios = [f"{row['findings_s'] / rows[peer]['findings_s']:.2f}" for peer in peers]
        print("| " + " | ".join([name, *cells, *ratios]) + " |")
    if output:
        Path(output).write_text(json.dumps(runs, indent=1))


def main() -> None:
    """Parses the command line and runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", required=True, help="token file")
    parser.add_argument("--peers", help="folder of the scripts of peers; without it, only this project is measured")
    parser.add_argument("--variants", nargs="*", help="names of variants (default: all)")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", help="JSON file of every run")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="with --child: print the time of each kernel in a step")
    options = parser.parse_args()
    if options.child is None:
        compare(options)
    else:
        print(
            "RESULT "
            + json.dumps(measure(options.child, options.tokens, options.steps, options.warmup, options.profile))
        )


if __name__ == "__main__":
    main()
