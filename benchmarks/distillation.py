"""Measures the cost of a teacher per training step: time and peak memory relative to a plain step, on one GPU.

    python benchmarks/distillation.py [--tokens tokens.npz] [--peer] [--output table.json]

Mistral-7B shapes with random NF4 weights (speed and memory do not depend on their values), LoRA r=64, Lion, rows of
8,192 tokens with a shared prefix. All variants train the same student on the same rows, in turn, in several rounds:

- plain: cross-entropy alone;
- base: the teacher is the student's base without its adapter;
- cached: targets of k = 32 are read from the shards of a cache, here within the step (``fit`` prefetches in a thread);
- full logits: the base again, but with both models' logits of every position at once and the divergence as in TRL's
  GKD, on this project's fused blocks;
- peer: the same on the modules of transformers and PEFT with gradient checkpointing (--peer: one minute more);
- nf4: a second model in 4 bits. It is built last, with another run of the plain variant, so that its weights are in the
  peak of no other variant.

Without ``--tokens`` (see ``train_step.py``) examples have random ids and typical lengths: a prefix of 160 tokens, 218
more of prompt and 167 of completion, both varied by up to a third.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import load_examples  # noqa: E402
from datamodules.batch import IGNORE_INDEX, Batch  # noqa: E402
from datamodules.packing import pack, to_batch  # noqa: E402
from datamodules.tokenization.chat_format import Example  # noqa: E402
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, Distillation, LoRA  # noqa: E402
from lightning_modules.losses.objectives import Objective  # noqa: E402
from lightning_modules.losses.teacher import Teacher, base_model_view, build_teacher  # noqa: E402
from lightning_modules.losses.teacher_cache import CachedTeacher, TeacherCache, digest  # noqa: E402
from lightning_modules.losses.teacher_shards import id_type, save_shard  # noqa: E402
from lightning_modules.models.backbone import enable_activation_checkpointing  # noqa: E402
from lightning_modules.models.decoder import Decoder  # noqa: E402
from optimizers import Lion  # noqa: E402

LIMITS = {
    "base": (1.45, 2.0),
    "nf4": (1.5, None),
    "cached": (1.05, 0.5),
}  #: promised limits: time ratio, additional GiB


Loss = Callable[[Batch], tuple[Tensor, Tensor]]


@dataclass
class Variant:
    """One way to compute the loss of a step.

    Attributes:
        objective: of the module.
        make_loss: returns a function from a batch to loss and supervised tokens; None for the module's own step.
        cached: reads the targets of rows.
        teacher: a teacher that is built already; None builds one in the first step of each run.
    """

    objective: Objective
    make_loss: Callable[[], Loss] | None = None
    cached: CachedTeacher | None = None
    teacher: Teacher | None = None


def typical_examples(count: int, scale: float, vocabulary: int) -> list[Example]:
    """Returns examples of random ids with typical lengths."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(5, vocabulary, int(160 * scale))
    examples = []
    for key in range(count):
        prompt, completion = (int(n * scale * rng.uniform(2 / 3, 4 / 3)) for n in (218, 167))
        ids = rng.integers(5, vocabulary, prompt + completion)
        start = np.concatenate([prefix, ids[:prompt]]).astype(np.int32)
        examples.append(Example("risk", len(prefix), start, ids[prompt:].astype(np.int32), key, key, "info", "", 1))
    return examples


def write_cache(folder: Path, examples: list[Example], k: int, vocabulary: int) -> CachedTeacher:
    """Writes a cache of realistic size with random numbers."""
    rng = np.random.default_rng(1)
    record = {"top_k": k, "vocabulary": vocabulary, "temperatures": [2.0]}
    ends = np.cumsum([len(example.completion_ids) for example in examples])
    tokens = int(ends[-1])
    arrays = {
        "keys": np.array([example.key for example in examples], np.uint64),
        "ends": ends,
        "ids": ((rng.integers(vocabulary, size=(tokens, 1)) + np.arange(k)) % vocabulary).astype(id_type(vocabulary)),
        "log_probs": np.log(rng.dirichlet(np.ones(k + 1), tokens)[:, :k]).astype(np.float16),
        "tails": np.log(rng.uniform(0.01, 1, (tokens, 1))).astype(np.float16),
    }
    save_shard(folder / "train-00000.safetensors", arrays, digest(record))
    (folder / "key.json").write_text(json.dumps(record))
    (folder / "done.json").write_text(json.dumps({"rows": None, "shards": ["train-00000.safetensors"]}))
    return CachedTeacher(TeacherCache(str(folder), k), {}, 2.0)


def full_logits(student: Decoder, teacher: Decoder, alpha: float, t: float) -> Loss:
    """Returns the direct loss: full logits of both models, masked afterwards (as TRL's GKDTrainer with beta 0)."""

    def loss(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_NV = teacher.head(teacher.hidden_states(batch).flatten(0, 1))
        logits_NV = student.head(student.hidden_states(batch).flatten(0, 1))
        labels_N = batch.labels_BT.flatten()
        divergence = kl_div(
            log_softmax(logits_NV / t, -1), log_softmax(teacher_NV / t, -1), log_target=True, reduction="none"
        )
        kl = divergence[labels_N != IGNORE_INDEX].sum()
        ce = cross_entropy(logits_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
        return alpha * t**2 * kl + (1 - alpha) * ce, (labels_N != IGNORE_INDEX).sum()

    return loss


class Bench:
    """A student, and the rows that every variant trains it on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.backbone = Backbone(
            f"random:{options.model}", options.quantization, options.dtype, lora=LoRA(options.rank, 2 * options.rank)
        )
        self.module = CausalLMModule(self.backbone, CompletionCrossEntropy(), partial(Lion, lr=5e-5))
        with torch.device(self.device):
            self.module.configure_model()
        self.module.to(self.device).train()
        self.vocabulary = self.module.model.get_output_embeddings().weight.shape[0]
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = Lion(self.parameters, lr=5e-5)
        scale = min(options.sequence_length / 8192, 1.0)
        examples = load_examples(options.tokens) if options.tokens else typical_examples(3000, scale, self.vocabulary)
        rows = pack(examples, sequence_length=options.sequence_length, mode="shared_prefix")
        np.random.default_rng(0).shuffle(rows)
        self.rows = rows[: options.steps + options.warmup]
        self.examples = [example for row in self.rows for example in row.examples]

    def run(self, variant: Variant) -> dict[str, float]:
        """Trains on the rows; returns milliseconds per step, the peak in GiB and the last loss."""
        module, cuda = self.module, self.device.type == "cuda"
        module.objective = variant.objective
        module.teacher_source.teacher, module.teacher_source.cache = variant.teacher, variant.cached
        step_loss = variant.make_loss() if variant.make_loss else None
        start = 0.0
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for step, row in enumerate(self.rows):
            if step == self.options.warmup:
                self._wait()
                start = time.perf_counter()
            batch = to_batch([row], self.options.sequence_length)
            batch.extras = variant.cached([row]) if variant.cached else None
            batch = module.transfer_batch_to_device(batch.pin_memory() if cuda else batch, self.device, 0)
            if step_loss is None:
                sums = module.compute_sums(batch)
                loss, count = sums["loss"], sums["count"]
            else:
                loss, count = step_loss(batch)
            loss.backward()
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], 1 / count)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        return {"ms": 1000 * seconds / self.options.steps, "gib": peak, "loss": float(loss.detach() / count)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def variants(self, folder: Path) -> dict[str, Variant]:
        """Returns the variants that need no second model."""
        cached = write_cache(folder, self.examples, 32, self.vocabulary)

        def on_fused_blocks() -> Loss:
            base = build_teacher("base", self.backbone, self.module.model, self.device, self.module.decoder)
            return full_logits(self.module.decoder, base.decoder, 0.5, 2.0)

        def on_transformers() -> Loss:
            enable_activation_checkpointing(self.module.model.get_base_model())
            return full_logits(Decoder(self.module.model), Decoder(base_model_view(self.module.model).eval()), 0.5, 2.0)

        variants = {
            "plain": Variant(CompletionCrossEntropy()),
            "base": Variant(Distillation()),
            "cached": Variant(Distillation(cache=TeacherCache(str(folder))), cached=cached),
            "full logits": Variant(CompletionCrossEntropy(), on_fused_blocks),
        }
        peer = {"peer": Variant(CompletionCrossEntropy(), on_transformers)}
        return variants | (peer if self.options.peer else {})


def rounds(bench: Bench, variants: dict[str, Variant], count: int) -> dict[str, dict[str, float]]:
    """Runs the variants in turn and returns the medians of each."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for number in range(count):
        for name, variant in variants.items():
            try:
                results[name].append(bench.run(variant))
                print(f"round {number}, {name}: {json.dumps(results[name][-1])}", flush=True)
            except torch.OutOfMemoryError:
                print(f"round {number}, {name}: out of memory", flush=True)
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
        if runs
    }


def report(medians: dict[str, dict[str, float]], plain: dict[str, float]) -> None:
    """Prints variants relative to the plain step."""
    for name, values in medians.items():
        ratio, more = values["ms"] / plain["ms"], values["gib"] - plain["gib"]
        limit = LIMITS.get(name)
        promised = "" if limit is None else f"<= {limit[0]} x" + (f", <= {limit[1]} GiB" if limit[1] else "")
        print(f"| {name} | {values['ms']:,.1f} | {ratio:.3f} | {values['gib']:.2f} | {more:+.2f} | {promised} |")


def main() -> None:
    """Reads the command line, runs all variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", help="token file of train_step.py")
    parser.add_argument("--model", default=str(ROOT / "benchmarks" / "mistral-7b"), help="folder of a config.json")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--sequence_length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", action="store_true", help="also on transformers' and PEFT's own modules")
    parser.add_argument("--output", help="JSON file of the medians")
    options = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(options)
    with tempfile.TemporaryDirectory() as folder:
        first = rounds(bench, bench.variants(Path(folder)), options.rounds)
    backbone = Backbone(bench.backbone.model_name_or_path, options.quantization, options.dtype)
    before = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
    teacher = build_teacher(backbone, bench.backbone, bench.module.model, bench.device)
    weights = (torch.cuda.memory_allocated() - before) / 2**30 if bench.device.type == "cuda" else 0.0
    both = {
        "plain, with its weights": Variant(CompletionCrossEntropy()),
        "nf4": Variant(Distillation(teacher=backbone), teacher=teacher),
    }
    second = rounds(bench, both, options.rounds)
    print("\n| variant | ms per step | x plain | peak GiB | GiB more | promised |\n|---|---|---|---|---|---|")
    report(first, first["plain"])
    report(second, second["plain, with its weights"] | {"gib": second["plain, with its weights"]["gib"] - weights})
    print(f"\nnf4: {weights:.2f} GiB of the additional memory are its weights, which 'plain, with its weights' has too")
    if options.output:
        Path(options.output).write_text(json.dumps({"first": first, "second": second, "weights": weights}, indent=1))


if __name__ == "__main__":
    main()
