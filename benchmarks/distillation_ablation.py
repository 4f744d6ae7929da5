"""Compares training a real model on few findings alone, with an online teacher and with a cached teacher.

    python benchmarks/distillation_ablation.py --output FOLDER [--seeds 2]         one GPU, about two minutes per seed
    python benchmarks/distillation_ablation.py --output FOLDER --tiny MODEL        any machine, to check that it runs

The embedded model (SmolLM2-135M-Instruct) is the base of all arms. The teacher has LoRA r=64 and is trained on
--teacher_findings; students have r=8 and are trained on --findings (far fewer), with the same number of steps each.
All arms are evaluated on the held-out findings of the students, and no two splits share a finding. Every arm is a
command of main.py with configs/distill.yaml; the table is read from the files of its Evaluation callback. The columns
of the untuned model, the majority class and the look-up are in each arm's evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from main import main as command  # noqa: E402

OBJECTIVE = "--model.init_args.objective"
FIGURES = {
    "loss": "held-out loss", "schema_valid": "schema-valid", "severity_accuracy": "severity acc.",
    "severity_macro_f1": "macro-F1", "risk_error": "risk error",
}  # fmt: skip


class Ablation:
    """Runs the arms of one seed, each in its own folder."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.folder = Path(options.output).resolve() / f"seed_{seed}"
        self.seconds: dict[str, float] = {}

    def settings(self, name: str, *, rank: int, findings: int, steps: int, source_seed: int) -> list[str]:
        """Returns the options that every command of an arm takes."""
        o = self.options
        # schema-constrained answers in addition would take half of the time
        callbacks = [
            {"class_path": "callbacks.RunRecord"},
            {"class_path": "callbacks.AdapterCheckpoint"},
            {"class_path": "callbacks.Throughput"},
            {
                "class_path": "callbacks.Evaluation",
                "init_args": {
                    "num_samples": o.samples,
                    "batch_size": o.samples,
                    "evaluate_untuned": False,
                    "constrained": False,
                    "num_printed": 0,
                },
            },
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"filename": "best", "monitor": "val/loss", "save_last": True},
            },
        ]
        settings = {
            "seed_everything": self.seed,
            "model.init_args.backbone.model_name_or_path": o.model,
            "model.init_args.backbone.quantization": "none",
            "model.init_args.backbone.dtype": o.dtype,
            "model.init_args.backbone.lora.rank": rank,
            "model.init_args.backbone.lora.alpha": 2 * rank,
            "model.init_args.optimizer.init_args.lr": o.lr,
            "model.init_args.lr_scheduler.init_args.warmup_steps": max(steps // 10, 1),
            "data.init_args.sources": [f"synthetic://?findings={findings}&seed={source_seed}"],
            "data.init_args.task_weights": {"risk": 1.0},
            "data.init_args.sequence_length": o.sequence_length,
            "data.init_args.severity_balance": 0.3,
            "data.init_args.val_fraction": 0.25,
            "data.init_args.test_fraction": 0,
            "data.init_args.seed": self.seed,
            "trainer.accelerator": o.accelerator,
            "trainer.precision": "32-true",
            "trainer.max_steps": steps,
            "trainer.val_check_interval": steps,
            "trainer.enable_progress_bar": False,
            "trainer.callbacks": callbacks,
            "trainer.logger.init_args.save_dir": str(self.folder),
            "trainer.logger.init_args.name": name,
        }
        lines = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        return ["--config", str(ROOT / "configs" / "distill.yaml"), *lines]

    def student(self, name: str) -> list[str]:
        """Returns the options of a student."""
        o = self.options
        return self.settings(name, rank=8, findings=o.findings, steps=o.steps, source_seed=100 + self.seed)

    def run(self, arm: str, *args: str) -> None:
        """Runs a command and adds up its time."""
        started = time.monotonic()
        print(f"\n=== seed {self.seed}, {arm}: {args[0]}", flush=True)
        if command(list(args)):
            raise SystemExit(f"{arm}: {args[0]} failed")
        self.seconds[arm] = self.seconds.get(arm, 0.0) + time.monotonic() - started

    def arms(self) -> dict[str, dict[str, Any]]:
        """Trains teacher and students; returns the scores of each on the students' held-out findings."""
        o = self.options
        plain = f"{OBJECTIVE}=lightning_modules.CompletionCrossEntropy"
        big = self.settings("teacher", rank=64, findings=o.teacher_findings, steps=o.teacher_steps, source_seed=7)
        small = {"rank": 64, "findings": o.findings, "steps": o.teacher_steps, "source_seed": 100 + self.seed}
        run = self.folder / "teacher" / "version_0"
        self.run("teacher", "fit", *big, plain, "--trainer.limit_val_batches=4")
        evaluation = self.settings("teacher", **small)
        self.run("teacher", "validate", *evaluation, plain, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}")
        adapter = {"model_name_or_path": o.model, "dtype": o.dtype, "adapter": str(run / "adapter" / "last")}
        teach = [f"{OBJECTIVE}.init_args.teacher={json.dumps(adapter)}", f"{OBJECTIVE}.init_args.alpha={o.alpha}"]
        cache = f"{OBJECTIVE}.init_args.cache.dir={self.folder / 'cache'}"
        self.run("student alone", "fit", *self.student("alone"), plain)
        self.run("online teacher", "fit", *self.student("online"), *teach)
        self.run("cached, k 32", "cache-teacher", *self.student("cached"), *teach, cache)
        self.run("cached, k 32", "fit", *self.student("cached"), *teach, cache)
        files = {
            "teacher": run / "evaluation_val.json",
            "student alone": self.folder / "alone" / "version_0" / "evaluation.json",
            "online teacher": self.folder / "online" / "version_0" / "evaluation.json",
            "cached, k 32": self.folder / "cached" / "version_0" / "evaluation.json",
        }
        return {arm: json.loads(file.read_text())["tasks"]["risk"] for arm, file in files.items()}


def report(scores: dict[str, dict[str, Any]], seconds: dict[str, float]) -> None:
    """Prints a table with 95 % intervals."""
    print("\n| arm | " + " | ".join(FIGURES.values()) + " | findings | total s |")
    print("|---" * (len(FIGURES) + 3) + "|")
    for arm, results in scores.items():
        column = results["columns"].get("tuned") or results["columns"]["this model"]
        cells = [_cell(column, name) for name in FIGURES]
        print(f"| {arm} | " + " | ".join(cells) + f" | {results['n']} | {seconds[arm]:.0f} |", flush=True)


def _cell(column: dict[str, Any], name: str) -> str:
    value = column["figures"].get(name)
    if value is None:
        return ""
    low, high = column["intervals"].get(name) or (None, None)
    return f"{value:.3f}" + (f" ({low:.3f}..{high:.3f})" if low is not None and high is not None else "")


def main() -> None:
    """Reads the command line and runs every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder of the runs")
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument(
        "--findings", type=int, default=600, help="findings of the students, a quarter of which are held out"
    )
    parser.add_argument("--teacher_findings", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--teacher_steps", type=int, default=250)
    parser.add_argument("--samples", type=int, default=100, help="held-out findings that are answered")
    parser.add_argument("--sequence_length", type=int, default=8192)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--accelerator", default="gpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiny", metavar="MODEL", help="another model, on the CPU, for two steps")
    options = parser.parse_args()
    if options.tiny:
        tiny = {
            "steps": 2,
            "teacher_steps": 2,
            "samples": 4,
            "findings": 60,
            "teacher_findings": 120,
            "sequence_length": 4096,
        }
        vars(options).update(tiny, model=options.tiny, accelerator="cpu", dtype="float32")
    for seed in range(options.seeds):
        ablation = Ablation(options, seed)
        scores = ablation.arms()
        report(scores, ablation.seconds)


if __name__ == "__main__":
    main()
