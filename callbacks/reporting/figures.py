"""Plots of one column of an evaluation: confusion matrix, calibration, error by category."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.output_text import plot_label
from datamodules.records import SEVERITIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_modules.evaluation.evaluate import EvaluationScores

SIZE = (4.6, 3.6)  #: inches


def draw_figures(scores: EvaluationScores) -> dict[str, Figure]:
    """Draws the plots of a task, by name; an empty dict for a task without severity, probability and categories."""
    drawn: dict[str, Figure] = {}
    if scores.confusion is not None and any(map(any, scores.confusion)):
        drawn["confusion"] = confusion(scores.confusion)
    if scores.reliability:
        drawn["calibration"] = calibration(scores.reliability)
    categories = scores.groups["category"]
    if len(categories) > 1 and any("severity_accuracy" in figures for figures in categories.values()):
        drawn["error_by_category"] = error_by_category(categories)
    return drawn


def confusion(matrix: list[list[int]]) -> Figure:
    """Draws expected against answered severities, in counts; the last column counts answers without a severity."""
    figure, axes = new_figure()
    axes.imshow([[count / max(sum(row), 1) for count in row] for row in matrix], cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(matrix):
        for x, count in enumerate(row):
            if count:
                axes.text(
                    x, y, str(count), ha="center", va="center", color="white" if 2 * count > sum(row) else "black"
                )
    axes.set_xticks(range(len(SEVERITIES) + 1), [*SEVERITIES, "none"], rotation=30, ha="right")
    axes.set_yticks(range(len(SEVERITIES)), SEVERITIES)
    axes.set_xlabel("answered")
    axes.set_ylabel("expected")
    axes.set_title("severity")
    return figure


def calibration(bins: list[tuple[float, float, float]]) -> Figure:
    """Draws mean expected against mean answered probability; the area of a dot is proportional to its answers."""
    figure, axes = new_figure()
    total = sum(count for count, _, _ in bins)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    axes.scatter(
        [p for _, p, _ in bins], [q for _, _, q in bins], s=[20 + 380 * n / total for n, _, _ in bins], alpha=0.7
    )
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel("answered probability")
    axes.set_ylabel("expected")
    axes.set_title("probability_actionable")
    return figure


def error_by_category(categories: dict[str, dict[str, float]]) -> Figure:
    """Draws, for each category, the share of wrong severities and, if measured, the mean error of the risk score."""
    figure, axes = new_figure()
    names = [f"{plot_label(name)} ({int(figures['answers'])})" for name, figures in categories.items()][::-1]
    wrong = [100 * (1 - figures.get("severity_accuracy", float("nan"))) for figures in categories.values()][::-1]
    errors = [figures.get("risk_error", float("nan")) for figures in categories.values()][::-1]
    positions = range(len(names))
    axes.barh([position + 0.2 for position in positions], wrong, height=0.4, label="wrong severity, %")
    axes.barh([position - 0.2 for position in positions], errors, height=0.4, label="risk error, points of 100")
    axes.set_yticks(list(positions), names)
    axes.legend(fontsize=8)
    axes.set_title("error by category")
    return figure


def new_figure() -> tuple[Figure, Any]:
    """Returns a figure and its axes outside of pyplot's global state: nothing to close, and no display is opened."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
