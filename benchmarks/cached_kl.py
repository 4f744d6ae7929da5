"""Measures the fraction of the full KL that a cached teacher keeps, on a real model, at k = 8, 32 and 128.

    python benchmarks/cached_kl.py [--steps 24] [--device cuda]

A student (LoRA on the embedded SmolLM2-135M-Instruct) is trained for some steps on generated findings. Then base and
student are compared on the supervised tokens of held-out findings, in both directions: the tuned model as the teacher
of the base, and the base as the teacher of the tuned model. "fraction" is the KL over k tokens and one bucket, in
float16 as in a cache, divided by the full KL; "top k" is the teacher's probability mass on those tokens at T = 1.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from datamodules import FindingsDataModule  # noqa: E402
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, Distillation, LoRA  # noqa: E402
from lightning_modules.losses.teacher import build_teacher  # noqa: E402
from lightning_modules.losses.teacher_shards import Targets, position_bytes, summarize  # noqa: E402
from lightning_modules.models.backend import supervised_positions  # noqa: E402
from lightning_modules.models.decoder import Predictions  # noqa: E402

TOP_K, TEMPERATURES = (8, 32, 128), (1.0, 2.0, 5.0)


def train(module: CausalLMModule, data: FindingsDataModule, steps: int, device: torch.device) -> None:
    """Trains with AdamW on one row per step."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for step, batch in zip(range(steps), data.train_batches(), strict=False):
        sums = module.compute_sums(module.transfer_batch_to_device(batch, device, 0))
        (sums["loss"] / sums["count"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 0:
            print(f"step {step}: loss {float(sums['loss'].detach() / sums['count']):.3f}", file=sys.stderr, flush=True)


@torch.no_grad()
def divergence(student: Predictions, labels_N: Tensor, teacher: Predictions | Targets, temperature: float) -> float:
    """Computes the mean KL(teacher || student) per token."""
    sums = Distillation(temperature=temperature)(student, labels_N, teacher)
    return float(sums["kl"]) / len(labels_N)


@torch.no_grad()
def cached_targets(teacher: Predictions, k: int, temperature: float) -> Targets:
    """Returns predictions in the form of a cache."""
    parts = [summarize(teacher.head(hidden), k, [temperature]) for hidden in teacher.hidden_NC.split(512)]
    ids, log_probs, tails = (torch.cat(part) for part in zip(*parts, strict=True))
    return Targets(ids, log_probs.half(), tails[:, 0].half())


def main() -> None:
    """Reads the command line, trains and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="held-out rows that are compared")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    source = ["synthetic://?findings=2000&seed=7"]
    data = FindingsDataModule(
        source, options.model, sequence_length=options.sequence_length, packing="shared_prefix", val_fraction=0.2
    )
    data.num_workers = 0
    data.setup()
    backbone = Backbone(options.model, dtype="float32", lora=LoRA(16, 32, num_top_layers=15), kernels="eager")
    module = CausalLMModule(backbone, CompletionCrossEntropy(), partial(torch.optim.AdamW, lr=1e-3))
    with torch.device(device):
        module.configure_model()
    module.to(device)
    train(module, data, options.steps, device)
    base = build_teacher("base", backbone, module.model, device, module.decoder)
    pairs: list[tuple[Predictions, Predictions, Tensor]] = []
    with torch.no_grad():
        for _, batch in zip(range(options.rows), data.eval_batches("val"), strict=False):
            batch = module.transfer_batch_to_device(batch, device, 0)
            positions_N = supervised_positions(batch)
            tuned = Predictions(module.decoder.hidden_states_at(batch, positions_N), module.decoder.head)
            pairs.append((base.predict(batch, positions_N), tuned, batch.labels_BT.flatten()[positions_N]))
    labels_N = torch.cat([labels for *_, labels in pairs])
    models = [
        Predictions(torch.cat([pair[which].hidden_NC for pair in pairs]), pairs[0][which].head) for which in (0, 1)
    ]
    vocabulary = models[0].head(models[0].hidden_NC[:1]).shape[1]
    print(f"{len(labels_N):,} supervised tokens, vocabulary {vocabulary:,}, {options.steps} steps")
    print("| teacher | T | KL per token | " + " | ".join(f"fraction at k {k} (top k)" for k in TOP_K) + " |")
    print("|---|---|---|" + "---|" * len(TOP_K))
    for name, teacher, student in (("tuned", models[1], models[0]), ("base", models[0], models[1])):
        for temperature in TEMPERATURES:
            full = divergence(student, labels_N, teacher, temperature)
            cells = []
            for k in TOP_K:
                targets = cached_targets(teacher, k, temperature)
                fraction = divergence(student, labels_N, targets, temperature) / full
                cells.append(f"{fraction:.4f} ({float(targets.log_probs_NK.float().exp().sum(1).mean()):.4f})")
            print(f"| {name} | {temperature:g} | {full:.4f} | " + " | ".join(cells) + " |", flush=True)
    print("bytes per token: " + ", ".join(f"k {k} {position_bytes(k, 1, vocabulary)}" for k in TOP_K))


if __name__ == "__main__":
    main()
