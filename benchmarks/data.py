"""Measures speed and peak memory of generating, reading, validating, tokenizing and packing findings.

    python benchmarks/data.py [--findings 10000 100000 2500000] [--measurements read first_batch] [--output table.json]

For each size an archive in the scanner's wire format is generated (and kept if ``--folder`` is given). Each figure is
then measured in a separate process. Rates are findings per second of processor time, in a process that is bound to one
core; ``first_batch`` is wall time with one additional reading process. If TRL is installed (it is no dependency), its
preparation of the same pairs, by the constructor of its ``SFTTrainer``, is measured for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from datamodules import FindingsDataModule
    from datamodules.tasks import Pair

SEQUENCE_LENGTH = 8192
TRL_FINDINGS = 20_000  #: TRL prepares a data set as a whole, at the same rate for every size


def one_core() -> None:
    """Binds this process and its threads to one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def read(archive: Path, model: str) -> dict[str, float]:
    """Measures archive to (prompt, completion) pairs: reading, validation, splitting and formatting."""
    one_core()
    start, count = time.process_time(), 0
    for pairs in _pairs(archive):
        count += len(pairs)
    return {"read_per_second": count / (time.process_time() - start)}


def train(archive: Path, model: str) -> dict[str, float]:
    """Measures archive to training batches of one epoch: also tokenization, deduplication, shuffling and packing."""
    one_core()
    data = _data(archive, model, num_workers=0, prefetch_batches=0)
    start, findings, used, rows = time.process_time(), 0, 0, 0
    data.setup()
    for batch in data.train_batches():
        rows += 1
        findings += batch.findings
        used += int((batch.segment_ids_BT >= 0).sum())
    seconds = time.process_time() - start
    return {"train_per_second": findings / seconds, "trained": findings, "row_fill": used / rows / SEQUENCE_LENGTH}


def first_batch(archive: Path, model: str) -> dict[str, float]:
    """Measures the seconds from a new data module to its first training batch, with one reading process."""
    archive.touch()  # an index that another measurement wrote is invalid for a changed file
    data = _data(archive, model)
    start = time.monotonic()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    return {"first_batch_seconds": time.monotonic() - start}


def trl(archive: Path, model: str) -> dict[str, float]:
    """Measures TRL on the same pairs: ``datasets.map`` with the tokenizer, then packing; no figures without TRL."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        return {}
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from datamodules.tasks import build_tasks
    from datamodules.tokenization.chat_format import load_tokenizer

    one_core()
    task, tokenizer = build_tasks(["risk"])["risk"], load_tokenizer(model)
    head = f"{task.system}\n\n{task.instruction}"
    records = [
        {
            "prompt": [{"role": "user", "content": head + pair.content}],
            "completion": [{"role": "assistant", "content": pair.completion}],
        }
        for pair in islice(chain.from_iterable(_pairs(archive)), TRL_FINDINGS)
    ]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    smallest = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer)))
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"output_dir": folder, "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
        config, dataset = SFTConfig(**quiet, packing=True, max_length=SEQUENCE_LENGTH), Dataset.from_list(records)
        start = time.process_time()
        trainer = SFTTrainer(smallest, args=config, train_dataset=dataset, processing_class=tokenizer)
        seconds = time.process_time() - start
        used = sum(map(len, trainer.train_dataset["input_ids"]))
    fill = used / len(trainer.train_dataset) / SEQUENCE_LENGTH
    return {"trl_per_second": len(records) / seconds, "trl_row_fill": fill}


MEASUREMENTS = {function.__name__: function for function in (read, train, first_batch, trl)}


def _pairs(archive: Path) -> Iterator[list[Pair]]:
    """Yields the pairs of each document and split."""
    from datamodules.sources import open_source, parse
    from datamodules.stream.splits import split_document
    from datamodules.tasks import build_tasks

    task = build_tasks(["risk"])["risk"]
    for raw in open_source(str(archive)).raw_documents():
        for part in split_document(parse(raw).document, val_fraction=0.01, test_fraction=0.01, seed=0).values():
            yield list(task.pairs(part))


def _data(archive: Path, model: str, **options: Any) -> FindingsDataModule:
    from datamodules import FindingsDataModule

    rows: dict[str, Any] = {"sequence_length": SEQUENCE_LENGTH, "packing": "shared_prefix"}
    return FindingsDataModule([str(archive)], model, val_fraction=0.01, test_fraction=0.01, **rows, **options)


def main() -> None:
    """Reads the command line, runs every measurement and prints one line of figures per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--findings", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help="model whose tokenizer is used")
    parser.add_argument("--measurements", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--folder", type=Path, help="folder that keeps the archives for later calls")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--child", nargs=2, metavar=("MEASUREMENT", "ARCHIVE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _report(options.child[0], Path(options.child[1]), options.model)
        return
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        for findings in options.findings:
            archive = (options.folder or Path(temporary)) / f"{findings}.tar.gz"
            table.append({"findings": findings, **_measure(findings, archive, options)})
            print(json.dumps({name: round(value, 3) for name, value in table[-1].items()}), flush=True)
    if options.output:
        options.output.write_text(json.dumps(table, indent=1))


def _report(name: str, archive: Path, model: str) -> None:
    """Measures one figure in this process, and the peak memory of it and of its reading process."""
    figures = MEASUREMENTS[name](archive, model)
    peaks = {f"{name}_peak_gib": resource.RUSAGE_SELF, f"{name}_reader_peak_gib": resource.RUSAGE_CHILDREN}
    for peak, who in peaks.items():
        if figures and (kib := resource.getrusage(who).ru_maxrss):
            figures[peak] = kib / 2**20
    print("RESULT " + json.dumps(figures))


def _measure(findings: int, archive: Path, options: argparse.Namespace) -> dict[str, float]:
    from datamodules.synthetic import synthesize

    figures: dict[str, float] = {}
    if not archive.exists():
        start = time.process_time()
        synthesize(archive, findings=findings, seed=0)
        figures["generated_per_second"] = findings / (time.process_time() - start)
    for name in options.measurements:
        command = [sys.executable, __file__, "--model", options.model, "--child", name, str(archive)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"{name} on {findings} findings failed:\n{done.stderr[-2000:]}")
        figures |= json.loads(lines[0].removeprefix("RESULT "))
    return figures


if __name__ == "__main__":
    main()
