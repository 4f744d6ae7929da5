"""The table before -> after, and samples for people: on the console with rich, in TensorBoard as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_modules.evaluation.evaluate import EvaluationScores, differences

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair

#: name of the figure, what the table calls it, how it is written
ROWS = (
    ("loss", "held-out loss per token", ".3f"),
    ("schema_valid", "schema-valid answers", ".0%"),
    ("exact_keys", "exactly the expected keys", ".0%"),
    ("json_cut", "readable by the agent", ".0%"),
    ("complete", "ended by itself", ".0%"),
    ("prompts_cut", "prompts cut to fit", ".0%"),
    ("severity_accuracy", "severity accuracy", ".0%"),
    ("input_determined_severity_accuracy", "  where the input tells it", ".0%"),
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
    ("faithful", "invents nothing", ".0%"),
    ("steps_f1", "remediation steps F1", ".2f"),
    ("commands_f1", "commands and checks F1", ".2f"),
    ("word_overlap", "word overlap", ".2f"),
)
HEADING = 20  #: width of a sample's headings, of which "tuned, constrained" is the longest
DULL = {"prompts_cut": 0.0, "complete": 1.0, "json_cut": 1.0}  #: left out where every column has this value


def shown_rows(columns: Mapping[str, EvaluationScores]) -> list[tuple[str, str, str]]:
    """Rows of the table that say something: at least one column has the figure, and not all its usual value."""
    rows = []
    for name, label, form in ROWS:
        values = [scores.figures[name] for scores in columns.values() if name in scores.figures]
        if values and any(value != DULL.get(name) for value in values):
            rows.append((name, label, form))
    return rows


def comparison(
    title: str, columns: Mapping[str, EvaluationScores], about: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Table:
    """One table: a row for each figure that a column has, a column for each model or baseline.

    Args:
        title: says what was measured and on how many findings.
        columns: heading -> scores, in order.
        about: heading -> ``step`` and ``checkpoint`` of the weights that were measured.
    """
    table = Table(title=title, caption="second lines: 95 % intervals", title_justify="left", show_lines=False)
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(_heading(heading, about.get(heading, {})), justify="right")
    for name, label, form in shown_rows(columns):
        table.add_row(label, *(cell(scores, name, form) for scores in columns.values()))
    return table


def _heading(heading: str, about: Mapping[str, Any]) -> str:
    if heading == "untuned" or "step" not in about:
        return heading
    return f"{heading}\n{'best' if 'checkpoint' in about else 'last'} step {about['step']}"


def by_category(columns: Mapping[str, EvaluationScores], input_determined: Collection[str]) -> Table:
    """Severity accuracy in each category of findings.

    Args:
        columns: heading -> scores.
        input_determined: categories whose severity the input tells.
    """
    table = Table(title="severity accuracy by category", title_justify="left")
    for heading in ("category", "findings", "input tells it"):
        table.add_column(heading)
    for heading in columns:
        table.add_column(heading, justify="right")
    first = next(iter(columns.values()))
    for category, figures in first.groups["category"].items():
        cells = [format(scores.groups["category"][category]["severity_accuracy"], ".0%") for scores in columns.values()]
        table.add_row(category, str(int(figures["answers"])), "yes" if category in input_determined else "no", *cells)
    return table


def cell(scores: EvaluationScores, name: str, form: str) -> str:
    """A figure, and its interval on the line below; "-" where it was not or could not be measured."""
    value = scores.figures.get(name, math.nan)
    if math.isnan(value):
        return "-"
    text = format(value, form)
    answered = scores.figures.get(f"{name.removesuffix('_error')}_answered", 1.0)
    if name == "risk_error" and answered < 1:
        text += f" on {answered:.0%}"  # of the answers have a number at all
    if name not in scores.intervals:
        return text
    low, high = scores.intervals[name]
    if low == high:  # a bootstrap of equal values has no width, which would be taken for certainty
        return text
    return f"{text}\n{format(low, form).rstrip('%')}..{format(high, form)}"


def sample(pair: Pair, outcomes: Mapping[str, str], width: int = 600) -> RenderableType:
    """One analysed finding: input, expected answer, what each model wrote and where it differs."""
    lines = [_line("input", pair.content, width), _line("expected", pair.completion, width)]
    for heading, text in outcomes.items():
        lines.append(_line(heading, text.strip() or "(nothing)", width))
        differing = differences(pair.completion, text)
        said = "equal to the expected answer" if not differing else "differs: " + _differing(differing)
        lines.append(Text(f"{'':<{HEADING}}{said}", style="dim"))
    return Group(*lines)


def markdown(pairs: Sequence[Pair], columns: Mapping[str, EvaluationScores], rows: int = 16, width: int = 500) -> str:
    """A table of samples for TensorBoard: input, expected answer, each model's answer, what differs in the last."""
    headings = ["input", "expected", *columns, "differs"]
    table = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for index, pair in enumerate(pairs[:rows]):
        texts = [scores.outcomes[index].text for scores in columns.values()]
        differing = differences(pair.completion, texts[-1]) if texts else {}
        cells = [pair.content, pair.completion, *texts, _differing(differing) or "nothing"]
        table.append("| " + " | ".join(_escape(text[:width]) for text in cells) + " |")
    return "\n".join(table)


def _line(heading: str, text: str, width: int) -> Text:
    shown = text if len(text) <= width else text[: width - 1] + "…"
    return Text.assemble((f"{heading:<{HEADING}}", "bold"), shown.replace("\n", "⏎"))


def _differing(differing: Mapping[str, tuple[object, object]]) -> str:
    parts = (f"{key} {_short(wanted)} -> {_short(got)}" for key, (wanted, got) in differing.items())
    return ", ".join(parts)


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _escape(text: str) -> str:
    """Text as one cell of Markdown: TensorBoard renders HTML, and what a finding says stays text."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "&#96;")):
        text = text.replace(character, entity)
    return text.replace("\n", " ⏎ ")
