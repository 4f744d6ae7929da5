"""How fast are findings read, gated, turned into pairs, tokenised and packed, and in how much memory?

    python benchmarks/data.py [--findings 10000 100000] [--model NAME] [--output table.json]

For each size an archive in the scanner's wire format is generated, then each figure is taken in a process of its own,
on one core where it is a rate. Where TRL is installed (it is no dependency), its own preparation of the same pairs
(``datasets.map`` and packing) stands beside.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ROW_TOKENS = 8192


def pairs_of(archive: str) -> Any:
    """Yields (task, pairs) of every document: read, repaired or quarantined, split, made into prompts and answers."""
    from datamodules.sources import open_source, parse
    from datamodules.stream.splits import split_document
    from datamodules.tasks import build_tasks

    task = build_tasks(["risk"])["risk"]
    for raw in open_source(archive).raw_documents():
        for part in split_document(parse(raw).document, val=0.01, test=0.01, seed=0).values():
            yield task, list(task.pairs(part))


def read(archive: str, model: str) -> dict[str, float]:
    """Archive to (prompt, completion) pairs."""
    start, count = time.process_time(), 0
    for _, pairs in pairs_of(archive):
        count += len(pairs)
    return {"findings": count, "pairs_per_second": count / (time.process_time() - start)}


def pack(archive: str, model: str) -> dict[str, float]:
    """Archive to packed rows."""
    from datamodules.packing import pack as pack_rows
    from datamodules.packing import to_batch
    from datamodules.tokenization import ChatFormat, load_tokenizer

    chat = ChatFormat(load_tokenizer(model))
    start, count, tokens, rows = time.process_time(), 0, 0, 0
    for task, pairs in pairs_of(archive):
        if not pairs:
            continue
        packed = pack_rows(chat.encode(task, pairs), row_tokens=ROW_TOKENS, mode="shared_prefix")
        for row in packed:
            to_batch([row], ROW_TOKENS)
            tokens += row.tokens
        count, rows = count + len(pairs), rows + len(packed)
    return {"packed_per_second": count / (time.process_time() - start), "row_fill": tokens / rows / ROW_TOKENS}


def first_batch(archive: str, model: str) -> dict[str, float]:
    """Seconds from an untouched data module to its first training batch, one worker."""
    from datamodules import FindingsDataModule

    start = time.monotonic()
    rows = {"row_tokens": ROW_TOKENS, "packing": "shared_prefix"}
    data = FindingsDataModule([archive], model, val=0.01, test=0.01, **rows)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    seconds = time.monotonic() - start
    if hasattr(batches, "close"):
        batches.close()
    return {"first_batch_seconds": seconds}


def trl(archive: str, model: str) -> dict[str, float]:
    """TRL's own road from the same pairs: ``datasets.map`` with the tokenizer, then packing; nothing without TRL."""
    try:
        from trl.data_utils import pack_dataset
    except ImportError:
        return {}
    from datasets import Dataset

    from datamodules.tokenization import load_tokenizer

    tokenizer = load_tokenizer(model)
    records = [
        {"prompt": task.system + "\n\n" + task.instruction + pair.content, "completion": pair.completion}
        for task, pairs in pairs_of(archive)
        for pair in pairs
    ]

    def encode(record: dict[str, str]) -> dict[str, list[int]]:
        roles = (("user", record["prompt"]), ("assistant", record["completion"]))
        messages = [{"role": role, "content": content} for role, content in roles]
        return {"input_ids": tokenizer.apply_chat_template(messages, return_dict=False)}

    start = time.process_time()
    mapped = Dataset.from_list(records).map(encode, remove_columns=["prompt", "completion"])
    pack_dataset(mapped, ROW_TOKENS)
    return {"trl_packed_per_second": len(records) / (time.process_time() - start)}


MEASUREMENTS = {function.__name__: function for function in (read, pack, first_batch, trl)}


def main() -> None:
    """Reads the command line, runs every measurement and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--findings", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help="whose tokenizer")
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--child", nargs=2, metavar=("MEASUREMENT", "ARCHIVE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, archive = options.child
        figures = MEASUREMENTS[name](archive, options.model)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print("RESULT " + json.dumps({**figures, f"{name}_peak_gib": peak} if figures else {}))
        return
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for findings in options.findings:
            table.append({"findings": findings, **_measure(findings, Path(folder), options)})
            print(json.dumps({k: round(v, 3) for k, v in table[-1].items()}), flush=True)
    if options.output:
        Path(options.output).write_text(json.dumps(table, indent=1))


def _measure(findings: int, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    from datamodules.synthetic import synthesize

    archive = folder / f"{findings}.tar.gz"
    start = time.monotonic()
    synthesize(archive, findings=findings, seed=0)
    figures = {"generated_per_second": findings / (time.monotonic() - start)}
    for name in options.measurements:
        command = [sys.executable, __file__, "--model", options.model, "--child", name, str(archive)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"{name} on {findings} findings failed:\n{done.stderr[-2000:]}")
        figures |= json.loads(lines[0].removeprefix("RESULT "))
    archive.unlink()
    return figures


if __name__ == "__main__":
    main()
