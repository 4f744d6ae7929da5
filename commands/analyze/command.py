"""``python main.py analyze``: a scanner report becomes one scored, correlated and summarised document."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from callbacks.task_progress import TaskProgress
from commands.analyze.html import to_html
from commands.analyze.markdown import to_markdown
from commands.analyze.pipeline import Analysis, Limits
from commands.cli import one_line
from commands.model_source import Trained, open_trained
from datamodules.errors import UserError
from datamodules.sources.decompression import loads
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.formats import Parsed
from datamodules.sources.scanner_report import read_report
from datamodules.tasks import TASKS
from datamodules.tokenization.chat_format import ChatFormat, load_tokenizer
from lightning_modules.generation.merged_weights import merged
from lightning_modules.generation.response_cache import MAX_NEW_TOKENS, CachedGenerator
from lightning_modules.models.backbone import out_of_memory_advice

if TYPE_CHECKING:
    from lightning_modules.generation.response_cache import Progress

INTERRUPTED = 130  #: exit status of a program that Ctrl-C stopped, as shells have it


def main(args: list[str]) -> int:
    """Runs ``analyze`` with its options; ``args`` begins with the command's name.

    Returns:
        0, or 130 after an interrupt.

    Raises:
        UserError: an option is unknown, missing or out of its range, or a file can't be read.
    """
    parser = ArgumentParser(prog="main.py analyze", exit_on_error=False, description=__doc__)
    parser.add_function_arguments(analyze)
    try:
        options = parser.parse_args([underscored(argument) for argument in args[1:]])
    except ArgumentError as error:
        raise UserError(f"analyze: {one_line(error)}; see python main.py analyze --help") from error
    return analyze(**options.as_dict())


def analyze(
    model: str,
    report: str,
    output: str,
    limit: int | None = None,
    batch_size: int | None = None,
    format: Literal["json", "markdown", "html"] = "json",
    constrained: bool | None = None,
    device: str = "auto",
    actions: int = 10,
    correlations: int = 16,
    max_new_tokens: int | None = None,
) -> int:
    """Scores every finding, ties findings together, summarises, and says what to do.

    Args:
        model: run folder, or a folder written by export.
        report: JSON file of the scanner, version 2 or 3.
        output: file to write; answers so far are kept in OUTPUT.partial.jsonl until it is whole.
        limit: only the report's first findings.
        batch_size: questions at once; null is 24 on a CPU, whose arithmetic runs out there, and 256 on a GPU.
        format: json is a ground_truth_v1 document; markdown and html (one file that loads nothing) are for people.
        constrained: whether a grammar keeps every answer to its schema; null is true where llguidance is installed.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        actions: findings above info that get a remediation, the riskiest of each kind first.
        correlations: groups of findings that the model judges.
        max_new_tokens: limit of an answer; null is a limit for each task.

    Raises:
        UserError: an option is out of its range, or a file can't be read or written.
    """
    for name, value, least in (
        ("limit", limit, 1), ("batch_size", batch_size, 1), ("actions", actions, 0), ("correlations", correlations, 0),
        ("max_new_tokens", max_new_tokens, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    source, target, console, started = Path(report), Path(output), Console(), time.monotonic()
    _check_target(target, source)
    parsed, reference = read(source, limit)
    trained = open_trained(model, "--model")
    journal = target.with_name(target.name + ".partial.jsonl")
    constrained = find_spec("llguidance") is not None if constrained is None else constrained
    tasks = [name for name in TASKS if trained.tasks is None or name in trained.tasks]
    limits = MAX_NEW_TOKENS if max_new_tokens is None else dict.fromkeys(TASKS, max_new_tokens)
    inquiry = build_generator(trained, device, batch_size, constrained, limits, journal)
    analysis = Analysis(
        inquiry, tasks, Limits(actions=actions, correlations=correlations), lambda task, n: _gauge(task, n, console)
    )
    try:
        with out_of_memory_advice("--batch_size"), merged(inquiry.model):  # once, and not for each task anew
            document = analysis(parsed.document)
    except KeyboardInterrupt:
        words = f"interrupted: answers so far are in {journal}; the same command goes on from there"
        console.print(words, soft_wrap=True, highlight=False, markup=False)
        return INTERRUPTED
    about = {"model": trained.name, "tasks": tasks, "constrained": constrained}
    results = document["enrichment_results"]
    results["model_report"] = about | {"answers": results["model_report"]}
    document["raw_reference"] = reference
    _write(target, WRITERS[format](document))
    journal.unlink(missing_ok=True)
    for line in _format_summary(document, target, inquiry.reused, time.monotonic() - started):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return 0


def read(source: Path, limit: int | None) -> tuple[Parsed, dict[str, Any]]:
    """Reads a report.

    Returns:
        What is usable of it, at most ``limit`` findings, and the document's ``raw_reference``.

    Raises:
        UserError: it can't be read, is no scanner report, or has findings of which none is usable.
    """
    try:
        data = source.read_bytes()
        value, _ = loads(data)
    except OSError as error:
        raise UserError(f"--report {source}: {error.strerror or error}") from error
    except InvalidRecord as error:
        raise UserError(f"--report {source}: not readable as JSON: {error.detail or error.reason}") from error
    parsed = read_report(value, f"--report {source}")
    document, unusable = parsed.document, parsed.quarantined
    if unusable and not document.findings:
        first = unusable[0]
        raise UserError(
            f"--report {source}: none of its {len(unusable)} findings is usable; number {first.position + 1}: "
            f"{first.reason} {first.detail}".rstrip()
        )
    reference = {
        "file": source.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "findings": len(document.findings),
        "repairs": dict(parsed.repairs),
        "unusable": [{"position": bad.position, "reason": bad.reason, "detail": bad.detail} for bad in unusable],
    }
    if limit is not None and limit < len(document.findings):
        document.findings[limit:] = []
        reference["limit"] = limit
    return parsed, reference


def build_generator(
    trained: Trained,
    device: str,
    batch_size: int | None,
    constrained: bool,
    max_new_tokens: dict[str, int],
    journal: Path | None,
) -> CachedGenerator:
    """Loads the model and its tokenizer.

    Raises:
        UserError: the device is not there, or the model can't be loaded.
    """
    chat = ChatFormat(load_tokenizer(trained.tokenizer))
    place = pick_device(device)
    model = trained.backbone.build(place)
    model.requires_grad_(False)
    return CachedGenerator(
        model,
        chat,
        identity=f"{trained.digest()} {chat.fingerprint()}",
        batch_size=batch_size or (24 if place.type == "cpu" else 256),
        constrained=constrained,
        max_new_tokens=max_new_tokens,
        cache_file=journal,
    )


def pick_device(name: str) -> torch.device:
    """The device that a name means; ``auto`` is the first GPU, or the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {one_line(error)[:120]}; give auto, cpu or cuda") from error
    return device


def dumps(document: dict[str, Any]) -> str:
    """The document as JSON for files: indented, and readable for any parser."""
    return json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


WRITERS = {"json": dumps, "markdown": to_markdown, "html": to_html}


@contextmanager
def _gauge(task: str, questions: int, console: Console) -> Iterator[Progress]:
    with TaskProgress(f"{task}: {questions} question{'s' * (questions != 1)}", console) as gauge:
        yield gauge


def _check_target(target: Path, source: Path) -> None:
    if target.is_dir():
        raise UserError(f"--output {target} is a folder; name a file in it, for example {target / 'enriched.json'}")
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"--output {target} is the report itself; choose another file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror or error}; choose another place") from error


def _write(target: Path, text: str) -> None:
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror or error}; choose another place") from error


def _format_summary(document: dict[str, Any], target: Path, reused: int, seconds: float) -> list[str]:
    findings, answers = document["enriched_findings"], document["enrichment_results"]["model_report"]["answers"]
    rate = len(findings) / max(seconds, 1e-9)
    lines = [
        f"{len(findings)} findings, {len(document['correlations'])} correlations, {len(document['actions'])} actions "
        f"in {seconds:.0f} s ({rate:.2g} findings/s{f', {reused} answers from before' if reused else ''}): {target}"
    ]
    for task, tally in answers.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in tally["by_rule"].items())
        lines.append(f"  {task:<12} {tally['by_model']} by the model" + (f"; by rule: {reasons}" if reasons else ""))
    if unusable := document["raw_reference"]["unusable"]:
        lines.append(f"  not usable   {len(unusable)} records of the report; see raw_reference.unusable")
    return lines


def underscored(argument: str) -> str:
    """``--batch-size`` is ``--batch_size``."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument
