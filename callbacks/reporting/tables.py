"""Tables of evaluation results and samples of answers: for the console (rich) and for TensorBoard (Markdown)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from datamodules.output_text import console_text, markdown, printable
from lightning_modules.evaluation.evaluate import EvaluationScores, differences

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair

#: name of the figure, label of the row, format
ROWS = (
    ("loss", "held-out loss per token", ".3f"),
    ("schema_valid", "schema-valid answers", ".0%"),
    ("exact_keys", "exactly the expected keys", ".0%"),
    ("json_cut", "readable by the agent", ".0%"),
    ("complete", "ended before the token limit", ".0%"),
    ("prompts_cut", "truncated prompts", ".0%"),
    ("severity_accuracy", "severity accuracy", ".0%"),
    ("input_determined_severity_accuracy", "  determined by the input", ".0%"),
    ("severity_macro_f1", "severity macro-F1", ".2f"),
    ("forced_severity_accuracy", "severity, forced choice", ".0%"),
    ("risk_error", "risk error (points of 100)", ".1f"),
    ("subscore_error", "sub-score error", ".3f"),
    ("actionable_brier", "actionable: Brier score", ".3f"),
    ("actionable_ece", "actionable: calibration error", ".3f"),
    ("tags_f1", "tags F1", ".2f"),
    ("ids_f1", "finding ids F1", ".2f"),
    ("ids_invented", "invented ids", ".0%"),
    ("numbers_invented", "invented numbers", ".0%"),
    ("faithful", "nothing invented", ".0%"),
    ("steps_f1", "remediation steps F1", ".2f"),
    ("commands_f1", "commands and checks F1", ".2f"),
    ("word_overlap", "word overlap", ".2f"),
)
NAME_WIDTH = 80  #: characters of a category, after which it is cut
HEADING_WIDTH = 20  #: characters of a heading of a sample; the longest is "tuned, constrained"
#: figure -> its usual value; the row is omitted if every column has it
USUAL_VALUES = {"prompts_cut": 0.0, "complete": 1.0, "json_cut": 1.0}


def informative_rows(columns: Mapping[str, EvaluationScores]) -> list[tuple[str, str, str]]:
    """Returns the rows with a figure in at least one column and with a value other than the usual one."""
    rows = []
    for name, label, form in ROWS:
        values = [scores.figures[name] for scores in columns.values() if name in scores.figures]
        if values and any(value != USUAL_VALUES.get(name) for value in values):
            rows.append((name, label, form))
    return rows


def comparison_table(
    title: str, columns: Mapping[str, EvaluationScores], about: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Table:
    """Builds the table that compares models and baselines: a row per figure, a column per model or baseline.

    Args:
        title: title of the table: task and number of findings.
        columns: heading -> scores, in order.
        about: heading -> ``step`` and ``checkpoint`` of the measured weights.
    """
    table = Table(title=title, caption="second lines: 95 % intervals", title_justify="left", show_lines=False)
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(console_text(_heading(heading, about.get(heading, {})), newlines=True), justify="right")
    for name, label, form in informative_rows(columns):
        table.add_row(label, *(format_cell(scores, name, form) for scores in columns.values()))
    return table


def _heading(heading: str, about: Mapping[str, Any]) -> str:
    if heading == "untuned" or "step" not in about:
        return heading
    return f"{heading}\n{weights_label(about)}"


def weights_label(about: Mapping[str, Any]) -> str:
    """Returns the words for the weights of a column: ``best step 12``, ``last step 20`` or ``untuned``.

    Args:
        about: ``step`` of the weights and, for a checkpoint's weights, ``checkpoint``, its file name.
    """
    checkpoint = about.get("checkpoint")
    if checkpoint is None and not about["step"]:
        return "untuned"
    kind = next((word for word in ("best", "last") if (checkpoint or "last").startswith(word)), "")
    return f"{kind} step {about['step']}".strip()


def category_table(columns: Mapping[str, EvaluationScores], input_determined: Collection[str]) -> Table:
    """Builds the table of severity accuracy in each category of findings.

    Args:
        columns: heading -> scores.
        input_determined: categories whose severity is determined by the input.
    """
    table = Table(title="severity accuracy by category", title_justify="left")
    for heading in ("category", "findings", "determined by input"):
        table.add_column(heading)
    for heading in columns:
        table.add_column(console_text(heading), justify="right")
    first = next(iter(columns.values()))
    for category, figures in first.groups["category"].items():
        cells = [format(scores.groups["category"][category]["severity_accuracy"], ".0%") for scores in columns.values()]
        table.add_row(
            console_text(category, NAME_WIDTH),
            str(int(figures["answers"])),
            "yes" if category in input_determined else "no",
            *cells,
        )
    return table


def format_cell(scores: EvaluationScores, name: str, form: str) -> str:
    """Returns a figure and, on a second line, its interval; "-" for a figure that was not measured or is NaN.

    Args:
        scores: scores of a column.
        name: name of the figure.
        form: format specification of the figure.
    """
    value = scores.figures.get(name, math.nan)
    if math.isnan(value):
        return "-"
    text = format(value, form)
    answered = scores.figures.get(f"{name.removesuffix('_error')}_answered", 1.0)
    if name == "risk_error" and answered < 1:
        text += f" on {answered:.0%}"  # share of the answers that have a risk score
    if name not in scores.intervals:
        return text
    low, high = scores.intervals[name]
    if low == high:  # a bootstrap of equal values has zero width, which would look like certainty
        return text
    return f"{text}\n{format(low, form).rstrip('%')}..{format(high, form)}"


def format_sample(pair: Pair, outcomes: Mapping[str, str], width: int = 600) -> RenderableType:
    """Formats one question for the console: input, expected answer, each model's answer and the differing keys.

    Args:
        pair: the question.
        outcomes: heading -> answer.
        width: characters of a text after which it is cut.
    """
    lines = [_line("input", pair.content, width), _line("expected", pair.completion, width)]
    for heading, text in outcomes.items():
        lines.append(_line(heading, text.strip() or "(empty)", width))
        differing = differences(pair.completion, text)
        note = "equal to the expected answer"
        if differing:
            note = "differs: " + printable(_format_differences(differing))
        lines.append(Text(f"{'':<{HEADING_WIDTH}}{note}", style="dim"))
    return Group(*lines)


def markdown_samples(
    pairs: Sequence[Pair], columns: Mapping[str, EvaluationScores], rows: int = 16, width: int = 500
) -> str:
    """Builds a Markdown table of samples for TensorBoard.

    Its columns are input, expected answer, each model's answer, and the keys in which the last answer differs.

    Args:
        pairs: the questions.
        columns: heading -> scores.
        rows: largest number of rows.
        width: characters of a text after which it is cut.
    """
    headings = ["input", "expected", *columns, "differs"]
    table = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for index, pair in enumerate(pairs[:rows]):
        texts = [scores.outcomes[index].text for scores in columns.values()]
        differing = differences(pair.completion, texts[-1]) if texts else {}
        cells = [pair.content, pair.completion, *texts, _format_differences(differing) or "nothing"]
        table.append("| " + " | ".join(markdown(text.replace("\n", "⏎"), width) for text in cells) + " |")
    return "\n".join(table)


def _line(heading: str, text: str, width: int) -> Text:
    shown = text if len(text) <= width else text[: width - 1] + "…"
    return Text.assemble((f"{printable(heading):<{HEADING_WIDTH}}", "bold"), printable(shown.replace("\n", "⏎")))


def _format_differences(differing: Mapping[str, tuple[object, object]]) -> str:
    parts = (f"{key} {_short(wanted)} -> {_short(got)}" for key, (wanted, got) in differing.items())
    return ", ".join(parts)


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
