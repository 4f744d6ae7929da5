"""Output of evaluation results: figures, plots and samples to the loggers, tables and samples to the console."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.reporting.figures import draw_figures
from callbacks.reporting.tables import category_table, comparison_table, format_sample, markdown_samples

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from rich.console import Console

    from lightning_modules.evaluation.results import TaskResults


def log_results(trainer: Trainer, results: TaskResults, heading: str, step: int) -> None:
    """Logs one column of a task: its figures to all loggers, plots and samples to TensorBoard.

    Args:
        trainer: holds the loggers.
        results: results of the task.
        heading: heading of the column.
        step: optimizer steps of the measured weights.
    """
    prefix, scores = f"evaluation_{results.task.name}", results.columns[heading]
    figures = {f"{prefix}/{name}": value for name, value in scores.figures.items() if not math.isnan(value)}
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=step)
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(f"{prefix}/samples", markdown_samples(results.pairs, results.models), step)
            for name, figure in draw_figures(scores).items():
                logger.experiment.add_figure(f"{prefix}/{name}", figure, step)


def print_results(console: Console, results: TaskResults, *, balanced: bool, num_printed: int) -> None:
    """Prints the tables of a task and some answered questions.

    Args:
        console: prints them.
        results: results of the task.
        balanced: whether the questions were balanced over severity.
        num_printed: number of questions to print.
    """
    sampling = "balanced over severity" if balanced else "as frequent as in the data"
    title = f"{results.task.name}: {len(results.pairs)} held-out pairs ({results.split}, {sampling}), greedy generation"
    console.print(comparison_table(title, results.columns, results.about))
    if results.task.name == "risk":
        console.print(category_table(results.columns, results.input_determined))
    for index in range(min(num_printed, len(results.pairs))):
        texts = {name: scores.outcomes[index].text for name, scores in results.models.items()}
        console.print(format_sample(results.pairs[index], texts), soft_wrap=True)
