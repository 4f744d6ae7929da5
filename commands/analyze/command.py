"""``python main.py analyze``: scores, correlates and summarises the findings of a scanner report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from callbacks.task_progress import TaskProgress
from commands.analyze.agent_format import to_agent
from commands.analyze.html import to_html
from commands.analyze.markdown import to_markdown
from commands.analyze.pipeline import Analysis, AnalysisLimits
from commands.device import pick_device
from commands.model_source import TrainedModel, open_trained_model
from commands.options import check_minimum, parse_function_options
from datamodules.errors import UserError
from datamodules.files import atomic_write
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

INTERRUPTED = 130  #: exit status after Ctrl-C, as shells define it
BATCH_SIZE_CPU, BATCH_SIZE_GPU = 24, 256  #: more answers at a time are no faster on a CPU, which is compute-bound there


def main(args: list[str]) -> int:
    """Runs ``analyze`` with its options.

    Args:
        args: the command's name and its options.

    Returns:
        The exit status: 0, or 130 after an interrupt.

    Raises:
        UserError: an option is unknown, missing or out of its range, or a file can't be read.
    """
    return analyze(**parse_function_options(args, analyze))


def analyze(
    model: str,
    report: str,
    output: str,
    limit: int | None = None,
    batch_size: int | None = None,
    format: Literal["json", "markdown", "html", "agent"] = "json",
    constrained: bool | None = None,
    device: str = "auto",
    actions: int = 10,
    correlations: int = 16,
    max_new_tokens: int | None = None,
) -> int:
    """Scores every finding, correlates findings, summarises the report and recommends actions.

    Args:
        model: run folder, or a folder written by export.
        report: JSON file of the scanner, version 2 or 3.
        output: file to write; until it is complete, finished answers are kept in OUTPUT.partial.jsonl.
        limit: use only the first findings of the report, at most this number.
        batch_size: answers generated at the same time; null is 24 on a CPU and 256 on a GPU.
        format: json is a ground_truth_v1 document; markdown and html (one file that loads nothing) are for people;
            agent is an EnrichedOutput document of sys-scan-graph's agent, for its HTML report, diff and --prev.
        constrained: whether a grammar constrains every answer to its schema; null is true if llguidance is installed.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        actions: number of findings above severity info that get a remediation, the riskiest of each kind first.
        correlations: number of groups of findings that the model correlates.
        max_new_tokens: limit of the length of an answer; null uses a limit for each task.

    Raises:
        UserError: an option is out of its range, or a file can't be read or written.
    """
    started = time.monotonic()
    check_minimum(
        {
            "limit": limit, "batch_size": batch_size, "actions": actions, "correlations": correlations,
            "max_new_tokens": max_new_tokens,
        },
        {"limit": 1, "batch_size": 1, "actions": 0, "correlations": 0, "max_new_tokens": 1},
    )  # fmt: skip
    source, target, console = Path(report), Path(output), Console()
    _check_target(target, source)
    parsed, reference = read(source, limit)
    trained = open_trained_model(model, "--model")
    partial_answers = target.with_name(target.name + ".partial.jsonl")
    constrained = find_spec("llguidance") is not None if constrained is None else constrained
    tasks = [name for name in TASKS if trained.tasks is None or name in trained.tasks]
    answer_limits = MAX_NEW_TOKENS if max_new_tokens is None else dict.fromkeys(TASKS, max_new_tokens)
    generator = build_generator(trained, device, batch_size, constrained, answer_limits, partial_answers)
    analysis = Analysis(
        generator,
        tasks,
        AnalysisLimits(actions=actions, correlations=correlations),
        lambda names, count: _task_progress(names, count, console),
        trained.rationale,
    )
    try:
        # the adapter is merged once for all tasks
        with out_of_memory_advice("--batch_size"), merged(generator.model):
            document = analysis(parsed.document)
    except KeyboardInterrupt:
        _print(console, [f"interrupted: finished answers are in {partial_answers}; to resume, run the command again"])
        return INTERRUPTED
    settings = {"model": trained.name, "tasks": tasks, "constrained": constrained}
    results = document["enrichment_results"]
    results["model_report"] = settings | {"answers": results["model_report"]}
    document["raw_reference"] = reference
    _write(target, WRITERS[format](document))
    partial_answers.unlink(missing_ok=True)
    _print(console, format_summary(document, target, generator.reused, time.monotonic() - started))
    return 0


def read(source: Path, limit: int | None) -> tuple[Parsed, dict[str, Any]]:
    """Reads a report.

    Args:
        source: file of the scanner.
        limit: largest number of findings; None for all.

    Returns:
        The usable part of the report, and the document's ``raw_reference``.

    Raises:
        UserError: the file can't be read, is no scanner report, or none of its findings is usable.
    """
    try:
        data = source.read_bytes()
        value, _ = loads(data)
    except OSError as error:
        raise UserError(f"--report {source}: {error.strerror or error}. Fix: give a file that can be read.") from error
    except InvalidRecord as error:
        problem = error.detail or error.reason
        raise UserError(f"--report {source}: not readable as JSON: {problem}. Fix: give a scanner's report.") from error
    parsed = read_report(value, f"--report {source}")
    document, unusable = parsed.document, parsed.quarantined
    if unusable and not document.findings:
        first = unusable[0]
        problem = f"{first.reason} {first.detail}".rstrip()
        raise UserError(
            f"--report {source}: none of its {len(unusable)} findings is usable; number {first.position + 1}: {problem}"
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
    trained: TrainedModel,
    device: str,
    batch_size: int | None,
    constrained: bool,
    max_new_tokens: dict[str, int],
    partial_answers: Path | None,
) -> CachedGenerator:
    """Loads a trained model and its tokenizer.

    Args:
        trained: the model on disk.
        device: value of ``--device``.
        batch_size: answers generated at the same time; None for the device's default.
        constrained: whether a grammar constrains every answer to its schema.
        max_new_tokens: limit of the length of an answer, by task.
        partial_answers: file of finished answers, which is read first; None for no file.

    Raises:
        UserError: the device does not exist, or the model can't be loaded.
    """
    chat = ChatFormat(load_tokenizer(trained.tokenizer))
    target_device = pick_device(device)
    model = trained.backbone.build(target_device)
    model.requires_grad_(False)
    return CachedGenerator(
        model,
        chat,
        identity=f"{trained.digest()} {chat.fingerprint()}",
        batch_size=batch_size or (BATCH_SIZE_CPU if target_device.type == "cpu" else BATCH_SIZE_GPU),
        constrained=constrained,
        max_new_tokens=max_new_tokens,
        cache_file=partial_answers,
    )


def dumps(document: dict[str, Any]) -> str:
    """Returns the document as indented ASCII JSON, which every parser can read."""
    return json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


WRITERS = {"json": dumps, "markdown": to_markdown, "html": to_html, "agent": lambda document: dumps(to_agent(document))}


@contextmanager
def _task_progress(names: str, count: int, console: Console) -> Iterator[Progress]:
    with TaskProgress(f"{names}: {count} question{'s' * (count != 1)}", console) as progress:
        yield progress


def _check_target(target: Path, source: Path) -> None:
    if target.is_dir():
        raise UserError(
            f"--output {target}: this is a folder. Fix: name a file in it, such as {target / 'enriched.json'}."
        )
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"--output {target}: this is the report itself. Fix: choose another file.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror or error}. Fix: choose another folder.") from error


def _write(target: Path, text: str) -> None:
    try:
        atomic_write(target, text)
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror or error}. Fix: choose another folder.") from error


def format_summary(document: dict[str, Any], target: Path, reused: int, seconds: float) -> list[str]:
    """Returns the lines that ``analyze`` prints at its end.

    Args:
        document: the analysis.
        target: file that was written.
        reused: answers read from an interrupted run.
        seconds: duration of the command.
    """
    findings, answers = document["enriched_findings"], document["enrichment_results"]["model_report"]["answers"]
    rate = len(findings) / max(seconds, 1e-9)
    earlier = f", {reused} answers of an interrupted run" if reused else ""
    lines = [
        f"{len(findings)} findings, {len(document['correlations'])} correlations, {len(document['actions'])} actions "
        f"in {seconds:.0f} s ({rate:.2g} findings/s{earlier}): {target}"
    ]
    for task, counts in answers.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts["by_rule"].items())
        lines.append(f"  {task:<12} {counts['by_model']} by the model" + (f"; by rule: {reasons}" if reasons else ""))
    if unusable := document["raw_reference"]["unusable"]:
        lines.append(f"  not usable   {len(unusable)} records of the report; see raw_reference.unusable")
    return lines


def _print(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
