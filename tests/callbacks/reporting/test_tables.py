"""Tests of the tables of an evaluation: rows, cells, categories, samples and their Markdown."""

import math
from io import StringIO

from rich.console import Console

from callbacks.reporting.tables import (
    HEADING_WIDTH,
    category_table,
    comparison_table,
    format_cell,
    format_sample,
    informative_rows,
    markdown_samples,
)
from datamodules.tasks import RiskTask
from datamodules.tasks.base import Pair
from lightning_modules.evaluation.evaluate import EvaluationScores, PredictionResult, score_predictions
from tests.helpers.tiny_evaluation import make_pair, task_results


def scores(figures, intervals=None, groups=None):
    return EvaluationScores(figures, intervals or {}, None, groups or {}, None, [])


def render(renderable, width=100):
    console = Console(file=StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_rows_with_usual_values_are_omitted():
    columns = {"a": scores({"complete": 1.0, "loss": 0.5}), "b": scores({"complete": 1.0, "prompts_cut": 0.1})}
    assert [name for name, _, _ in informative_rows(columns)] == ["loss", "prompts_cut"]
    columns["c"] = scores({"complete": 0.9})
    assert [name for name, _, _ in informative_rows(columns)] == ["loss", "complete", "prompts_cut"]


def test_cells_have_figure_and_interval():
    column = scores({"severity_accuracy": 0.68, "loss": math.nan}, {"severity_accuracy": (0.54, 0.79)})
    assert format_cell(column, "severity_accuracy", ".0%") == "68%\n54..79%"
    assert format_cell(column, "loss", ".3f") == "-"
    assert format_cell(column, "tags_f1", ".2f") == "-"


def test_a_risk_error_on_some_answers_names_their_share():
    column = scores({"risk_error": 5.0, "risk_answered": 0.5})
    assert format_cell(column, "risk_error", ".1f") == "5.0 on 50%"
    assert format_cell(scores({"risk_error": 5.0, "risk_answered": 1.0}), "risk_error", ".1f") == "5.0"


def test_an_interval_of_zero_width_is_not_shown():
    assert format_cell(scores({"severity_macro_f1": 0.0}, {"severity_macro_f1": (0.0, 0.0)}),
                       "severity_macro_f1", ".2f") == "0.00"  # fmt: skip


def test_headings_contain_the_step_of_the_weights():
    columns = {"untuned": scores({"loss": 2.0}), "tuned": scores({"loss": 1.0}), "now": scores({"loss": 1.5})}
    about = {"untuned": {"step": 0}, "tuned": {"step": 12, "checkpoint": "best.ckpt"}, "now": {"step": 20}}
    text = render(comparison_table("title", columns, about))
    assert "best step 12" in text
    assert "last step 20" in text
    assert "step 0" not in text


def test_the_table_shows_unmeasured_figures_as_a_dash():
    pairs = [make_pair(0), make_pair(1)]
    first, empty = PredictionResult(pairs[0].completion, nll=2.0, tokens=4), PredictionResult("", nll=6.0, tokens=4)
    half = score_predictions(RiskTask(), pairs, [first, empty])
    none = score_predictions(RiskTask(), pairs, [PredictionResult(""), PredictionResult("")])
    assert half.figures["loss"] == 1.0
    assert math.isnan(none.figures["risk_error"])
    text = render(comparison_table("title", {"half": half, "none": none}))
    rows = {line.split("  ")[0].strip("│┃ "): line for line in text.splitlines()}
    assert "0.0 on 50%" in rows["risk error (points of 100)"]
    assert rows["risk error (points of 100)"].rstrip("│ ").endswith("-")
    assert "50%" in rows["severity accuracy"]
    assert "0.00..0.00" not in text  # no correct answer is not certainty


def test_categories_have_one_row_each():
    groups = {"category": {"network": {"answers": 3.0, "severity_accuracy": 1.0},
                           "mac": {"answers": 1.0, "severity_accuracy": 0.25}}}  # fmt: skip
    lines = render(category_table({"tuned": scores({}, groups=groups)}, {"network"})).splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [["network", "3", "yes", "100%"], ["mac", "1", "no", "25%"]]


def test_a_sample_shows_the_differing_keys():
    pair = make_pair(1)
    answers = {"tuned": pair.completion, "untuned": '{"risk_score":10,"severity":"high"}', "empty": " "}
    lines = render(format_sample(pair, answers), width=200).splitlines()
    headings = [line[:HEADING_WIDTH].strip() for line in lines]
    assert headings == ["input", "expected", "tuned", "", "untuned", "", "empty", ""]
    assert lines[3].strip() == "equal to the expected answer"
    assert lines[5].strip() == 'differs: severity "low" -> "high"'
    assert lines[6].endswith("(empty)")


def test_a_long_text_is_cut_in_a_sample():
    pair = Pair("risk", "x" * 700, "{}", "low", "network", 1)
    assert "x" * 599 + "…" in render(format_sample(pair, {}), width=800)


def test_markdown_escapes_text_of_findings():
    hostile = Pair("risk", '{"title":"<script>|x"}', make_pair(1).completion, "low", "network", 1)
    column = score_predictions(RiskTask(), [hostile], [PredictionResult("a|b\n<b>", nll=1.0, tokens=2)])
    table = markdown_samples([hostile], {"tuned": column})
    assert "<" not in table
    assert all(line.count("|") == 5 for line in table.splitlines())


def test_markdown_has_one_row_per_question_up_to_a_limit():
    pairs = [make_pair(i) for i in range(5)]
    results = task_results(pairs, "nonsense")
    lines = markdown_samples(pairs, results.models, rows=3).splitlines()
    assert len(lines) == 2 + 3
    assert lines[0] == "| input | expected | untuned | tuned | differs |"
    assert lines[2].endswith("| nothing |")  # the last column's answer is right
