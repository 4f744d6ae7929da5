"""Measures how many findings per second ``analyze`` processes, with the shapes of a large model.

    python benchmarks/analyze.py --tokenizer FOLDER [--report report.json] [--findings 234,2340] [--output table.json]

The model has Mistral-7B's shapes and random weights: the speed does not depend on their values, but the answers do.
Every answer is therefore forced, token by token, to an answer of median length among generated pairs of its task, and
the grammar is computed nevertheless: the time is that of a trained model whose answers end. Everything else is the
command's own code: reading, prompts, batches, prefix cache, grammar, the document and its ids.

``merged`` is the model that ``export --format merged`` writes (bf16, no adapter), ``nf4`` the NF4 base of a run with
LoRA r=64.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from commands.analyze.pipeline import Analysis  # noqa: E402
from commands.device import pick_device  # noqa: E402
from datamodules.findings import FindingsDataModule  # noqa: E402
from datamodules.records import Document  # noqa: E402
from datamodules.sources.decompression import loads  # noqa: E402
from datamodules.sources.scanner_report import read_report  # noqa: E402
from datamodules.synthetic import iter_documents  # noqa: E402
from datamodules.tasks import TASKS  # noqa: E402
from datamodules.tokenization.chat_format import ChatFormat, load_tokenizer  # noqa: E402
from lightning_modules import Backbone, LoRA  # noqa: E402
from lightning_modules.generation.merged_weights import merged  # noqa: E402
from lightning_modules.generation.response_cache import CachedGenerator  # noqa: E402

SOURCE = "synthetic://?findings=600&seed=7"  #: answers of usual length, and findings if no report is given


class ForcedAnswer:
    """A grammar whose masks are restricted to the next token of a given answer.

    Args:
        grammar: computed in each step as for any answer.
        ids: token ids of the answer, including the end of sequence.
    """

    def __init__(self, grammar: Any, ids: list[int]) -> None:
        self.grammar, self.ids = grammar, ids

    def start(self) -> Any:
        """Returns the matcher of one answer, which counts its tokens."""
        matcher = self.grammar.start()
        matcher.answer = iter(self.ids)
        return matcher

    def allowed(self, matchers: list[Any]) -> torch.Tensor:
        """Returns masks that allow the next token only; raises an error if the grammar forbids it."""
        bits_BW = self.grammar.allowed(matchers)
        for row, matcher in zip(bits_BW, matchers, strict=True):
            if matcher is None:
                continue
            following = next(matcher.answer)
            bit = 1 << following % 32
            bit -= (bit >> 31) << 32  # the highest bit is the sign
            assert row[following // 32] & bit, f"the grammar forbids token {following} of the forced answer"
            row.zero_()
            row[following // 32] = bit
        return bits_BW


class ForcedGenerator(CachedGenerator):
    """Generates as ``analyze`` does, and returns answers of usual length.

    Args:
        answers: token ids of one answer per task.
        seconds: filled with the time of each group of tasks that is generated together.
        **options: arguments of :class:`~lightning_modules.generation.response_cache.CachedGenerator`.
    """

    def __init__(self, answers: dict[str, list[int]], seconds: dict[str, float], **options: Any) -> None:
        super().__init__(**options)
        self.answers, self.seconds = answers, seconds

    def _constraint(self, task: Any) -> Any:
        return ForcedAnswer(super()._constraint(task), self.answers[task.name])

    def __call__(self, questions: Any, progress: Any = lambda share: None) -> Any:
        """Generates the responses and measures the time."""
        started = time.perf_counter()
        responses = super().__call__(questions, progress)
        counts = Counter(task.name for task, _ in questions)
        name = ", ".join(f"{task} ({count})" for task, count in counts.items())
        self.seconds[name] = time.perf_counter() - started
        assert all(response.complete for response in responses)
        return responses


def usual_answers(data: FindingsDataModule) -> dict[str, list[int]]:
    """Returns the token ids of each task's answer of median length.

    Severities are high, so that every task has findings to work on.
    """
    answers = {}
    for name in TASKS:
        pairs = [pair for pair in data.pairs("train", name, 400) if name != "risk" or pair.severity == "high"]
        ids = [example.completion_ids.tolist() for example in data.chat.encode(data.tasks[name], pairs)]
        answers[name] = sorted(ids, key=len)[len(ids) // 2]
    return answers


def repeated(document: Document, count: int) -> Document:
    """Returns a report of ``count`` findings; copies differ in title and id, so that each one is generated."""
    findings = []
    for number in range(count):
        finding = copy.deepcopy(document.findings[number % len(document.findings)])
        copies = number // len(document.findings)
        finding.title, finding.id = finding.title + f" ({copies})" * bool(copies), f"{finding.id}-{copies}"
        findings.append(finding)
    return replace(document, findings=findings, correlations=[])


def measure(generator: ForcedGenerator, document: Document, repeats: int) -> dict[str, Any]:
    """Analyses a report several times; returns the figures of the fastest pass, and the median speed."""
    passes = []
    for _ in range(repeats):
        generator.responses.clear()  # no answer of the pass before
        generator.seconds.clear()
        started = time.perf_counter()
        with merged(generator.model):
            Analysis(generator, TASKS)(copy.deepcopy(document))
        passes.append((time.perf_counter() - started, dict(generator.seconds)))
    seconds, by_task = min(passes, key=lambda one: one[0])
    count = len(document.findings)
    return {
        "findings": count,
        "findings_s": round(count / seconds, 1),
        "median_findings_s": round(count / statistics.median(one[0] for one in passes), 1),
        "first_findings_s": round(count / passes[0][0], 1),
        "risk_findings_s": round(count / next(iter(by_task.values())), 1),
        "seconds": {"all": round(seconds, 1)} | {task: round(value, 1) for task, value in by_task.items()},
    }


def load(kind: str, folder: str, device: torch.device) -> Any:
    """Builds the model of a kind with random weights."""
    backbone = partial(Backbone, f"random:{folder}", dtype="float32" if device.type == "cpu" else "bfloat16")
    chosen = backbone("none") if kind == "merged" else backbone("nf4", lora=LoRA(64, 128))
    return chosen.build(device).requires_grad_(False)


def main() -> None:
    """Measures each kind and number of findings, and prints one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of the model's tokenizer (Mistral-7B-Instruct-v0.3)")
    parser.add_argument("--model", default=str(ROOT / "benchmarks" / "mistral-7b"), help="folder with a config.json")
    parser.add_argument("--report", help="scanner report; without it generated findings")
    parser.add_argument("--findings", default="234,2340")
    parser.add_argument("--kinds", default="merged,nf4")
    parser.add_argument("--batch_size", type=int, default=234)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    device = pick_device(args.device)
    shares = dict.fromkeys(TASKS, 1.0)
    data = FindingsDataModule(
        [SOURCE], tokenizer=args.tokenizer, task_weights=shares, sequence_length=8192, val_fraction=0.05
    )
    data.setup()
    answers = usual_answers(data)
    print("forced answers:", {task: f"{len(ids)} tokens" for task, ids in answers.items()}, flush=True)
    report = loads(Path(args.report).read_bytes())[0] if args.report else next(iter_documents(234, seed=1))
    document = read_report(report, args.report or "generated").document
    rows = []
    for kind in args.kinds.split(","):
        model = load(kind, args.model, device)
        for count in map(int, args.findings.split(",")):
            generator = ForcedGenerator(
                answers, {}, model=model, chat=ChatFormat(load_tokenizer(args.tokenizer)), identity="random",
                batch_size=args.batch_size,
            )  # fmt: skip
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row = {"kind": kind, "batch_size": args.batch_size} | measure(
                generator, repeated(document, count), args.repeats
            )
            if device.type == "cuda":
                row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            print(json.dumps(row), flush=True)
            rows.append(row)
        del model
    if args.output:
        Path(args.output).write_text(json.dumps({"device": str(device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
