"""``python main.py analyze``: scores, correlates and summarises the findings of a scanner report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console

from commands import __version__
from commands.analyze.agent_format import to_agent
from commands.analyze.answer_collector import AnswerGenerator
from commands.analyze.assessment.limits import KnownLimits, known_limits
from commands.analyze.assessment.trust import Trust
from commands.analyze.console import trust_lines
from commands.analyze.html import to_html
from commands.analyze.inputs import Inputs, Report, find_reports, parse_report
from commands.analyze.markdown import to_markdown
from commands.analyze.outputs import Results, open_results
from commands.analyze.pipeline import Analysis, AnalysisLimits
from commands.analyze.report_loop import ReportLoop
from commands.analyze.several.shared_batches import ShowProgress, run_together
from commands.analyze.several.totals import Totals
from commands.device import pick_device
from commands.model_source import TrainedModel, open_trained_model
from commands.options import check_minimum, parse_function_options
from datamodules.errors import UserError
from datamodules.tasks import TASKS
from datamodules.tokenization.chat_format import ChatFormat, load_tokenizer
from lightning_modules.generation.merged_weights import merged
from lightning_modules.generation.response_cache import MAX_NEW_TOKENS, CachedGenerator
from lightning_modules.models.backbone import out_of_memory_advice

SOME_UNREADABLE = 1  #: exit status if some, but not all, reports can't be read
INTERRUPTED = 130  #: exit status after Ctrl-C, as shells define it
MAX_CACHED_ANSWERS = 50_000  #: answers in memory, some 30 MB
REPORT_HELP = "scanner's JSON files (version 2, 3 or 4), folders, globs or archives (.tar, .tar.gz, .tar.zst)"
#: options that don't change a result
NOT_IN_RESULTS = ("model", "report", "output", "batch_size", "device")
BATCH_SIZE_CPU, BATCH_SIZE_GPU = 24, 256  #: more answers at a time are no faster on a CPU, which is compute-bound there


def main(args: list[str]) -> int:
    """Runs ``analyze`` with its options.

    Args:
        args: the command's name and its options.

    Returns:
        The exit status: 0; 1 if some of the reports can't be read; 130 after an interrupt.

    Raises:
        UserError: an option is unknown, missing or out of its range, the output can't be written, or no report can be
            read.
    """
    return analyze(**parse_function_options(args, analyze, lists={"report": REPORT_HELP}))


def analyze(
    model: str,
    report: list[str],
    output: str,
    limit: int | None = None,
    batch_size: int | None = None,
    format: Literal["json", "markdown", "html", "v4", "agent"] = "json",
    constrained: bool | None = None,
    device: str = "auto",
    actions: int = 10,
    correlations: int = 16,
    max_new_tokens: int | None = None,
    trust: Trust = "higher",
) -> int:
    """Scores every finding, correlates findings, summarises each report and recommends actions.

    Args:
        model: run folder, or a folder written by export.
        report: scanner's JSON files (version 2, 3 or 4), folders, globs or archives.
        output: file for one report; a folder, or a file with suffix .jsonl, for several. The same command resumes.
        limit: use only the first findings of each report, at most this number.
        batch_size: answers generated at the same time; null is 24 on a CPU and 256 on a GPU.
        format: json is a ground_truth_v1 document; v4 has the raw scan in addition; markdown and html (one file that
            loads nothing) are for people; agent is an EnrichedOutput document of sys-scan-graph's agent, for its HTML
            report, diff and --prev.
        constrained: whether a grammar constrains every answer to its schema; null is true if llguidance is installed.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        actions: number of findings above severity info that get a remediation, the riskiest of each kind first.
        correlations: number of groups of findings that the model correlates.
        max_new_tokens: limit of the length of an answer; null uses a limit for each task.
        trust: whose severities rank the findings: scanner, model, or the higher one of the two for each finding.

    Raises:
        UserError: an option is out of its range, the output can't be written, or no report can be read.
    """
    options = dict(locals())  # before any other variable: the options of this call
    started = time.monotonic()
    check_minimum(
        {
            "limit": limit, "batch_size": batch_size, "actions": actions, "correlations": correlations,
            "max_new_tokens": max_new_tokens,
        },
        {"limit": 1, "batch_size": 1, "actions": 0, "correlations": 0, "max_new_tokens": 1},
    )  # fmt: skip
    console = Console()
    inputs = find_reports(report, Path(output).expanduser())
    trained = open_trained_model(model, "--model")
    constrained = find_spec("llguidance") is not None if constrained is None else constrained
    tasks = [name for name in TASKS if trained.tasks is None or name in trained.tasks]
    answer_limits = MAX_NEW_TOKENS if max_new_tokens is None else dict.fromkeys(TASKS, max_new_tokens)
    on_cpu = pick_device(device).type == "cpu"
    batch = batch_size or (BATCH_SIZE_CPU if on_cpu else BATCH_SIZE_GPU)
    with open_results(output, inputs, format) as results:

        def load() -> CachedGenerator:
            return build_generator(trained, device, batch, bool(constrained), answer_limits, results.answers)

        analyzer = ReportAnalyzer(
            load, {"model": trained.name, "tasks": tasks, "constrained": constrained},
            AnalysisLimits(actions=actions, correlations=correlations), trust, partial(known_limits, trained),
            trained.rationale,
        )  # fmt: skip
        kept = {name: value for name, value in options.items() if name not in NOT_IN_RESULTS}
        settings = {**kept, "constrained": constrained, "version": __version__, "digest": trained.digest()}
        totals = Totals(trust_lines)
        parse = partial(parse_report, limit=limit, with_raw=format in WITH_RAW_SCAN)
        try:
            with analyzer:
                ReportLoop(inputs, results, totals, parse, analyzer, WRITERS[format], settings, batch).run(console)
        except KeyboardInterrupt:
            _print(console, [_interrupted(inputs, results, totals)])
            return INTERRUPTED
        results.finish(totals.set_aside)
    if not totals.reports + totals.done_before:
        first = totals.set_aside[0]
        raise UserError(
            f"--report: none of the {len(totals.set_aside)} reports can be read; {first['report']}: {first['reason']}"
        )
    lines = totals.lines(results.target, time.monotonic() - started, analyzer.reused, inputs.ignored)
    _print(console, lines)
    return SOME_UNREADABLE if totals.set_aside else 0


class ReportAnalyzer:
    """Analyses reports with one model. The model is loaded, and its adapter merged, for the first one.

    A context manager, which restores the model at its end.

    Args:
        load: loads the model.
        settings: model, tasks and settings of the document's ``model_report``.
        limits: bounds of an analysis.
        trust: whose severities rank the findings.
        find_limits: finds the known limits of the model.
        rationale: whether the model was trained to state a rationale in answers of the risk task.
    """

    def __init__(
        self,
        load: Callable[[], CachedGenerator],
        settings: dict[str, Any],
        limits: AnalysisLimits,
        trust: Trust,
        find_limits: Callable[[], KnownLimits],
        rationale: bool,
    ) -> None:
        self._load, self._settings, self._limits = load, settings, limits
        self._trust, self._rationale = trust, rationale
        self._find_limits, self._known_limits = find_limits, KnownLimits()
        self._generator: CachedGenerator | None = None
        self._stack = ExitStack()

    @property
    def reused(self) -> int:
        """Number of answers that were not generated again."""
        return 0 if self._generator is None else self._generator.reused

    def __enter__(self) -> Self:
        """Returns the object."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Restores the model."""
        return self._stack.__exit__(kind, error, traceback)

    def __call__(self, reports: Sequence[Report], show_progress: ShowProgress) -> list[dict[str, Any]]:
        """Returns the analyses of reports, whose questions are answered in shared batches.

        Args:
            reports: the reports.
            show_progress: opens the progress display of tasks.
        """
        generator = self._generator
        if generator is None:
            generator = self._generator = self._load()
            self._known_limits = self._find_limits()
            self._stack.enter_context(out_of_memory_advice("--batch_size"))
            self._stack.enter_context(merged(generator.model))
        if len(generator.responses) > MAX_CACHED_ANSWERS:  # answers are kept for equal findings of other reports
            generator.responses.clear()
        return run_together([partial(self._analyze, report) for report in reports], generator, show_progress)

    def _analyze(self, report: Report, generator: AnswerGenerator) -> dict[str, Any]:
        tasks, limits = self._settings["tasks"], self._limits
        analysis = Analysis(
            generator, tasks, limits,
            trust=self._trust, known_limits=self._known_limits, rationale=self._rationale,
        )  # fmt: skip
        document = analysis(report.parsed.document, report.reference)
        results = document["enrichment_results"]
        results["model_report"] = self._settings | results["model_report"]
        document["raw_reference"] = report.reference
        return document


def _interrupted(inputs: Inputs, results: Results, totals: Totals) -> str:
    kept = f"finished answers are in {results.answers}"
    if inputs.several:
        count = totals.reports + totals.done_before
        kept = f"{count} of {len(inputs.reports)} reports are done, and {kept}"
    return f"interrupted: {kept}; to resume, run the command again"


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


WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "json": dumps,
    "v4": dumps,
    "markdown": to_markdown,
    "html": to_html,
    "agent": lambda document: dumps(to_agent(document)),
}
WITH_RAW_SCAN = ("v4",)  #: formats that hold the raw scan


def _print(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
