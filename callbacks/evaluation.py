"""Evaluation of the model on held-out findings before and after fine-tuning, compared with baselines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from callbacks.best_checkpoint import best_weights
from callbacks.paths import run_directory
from callbacks.reporting.results_output import log_results, print_results
from callbacks.task_evaluator import TaskEvaluator, load_questions
from lightning_modules.evaluation.results import TaskResults, read_results, write_results


class Evaluation(Callback):
    """Measures the model on held-out findings at the start and the end of a fit, and in ``validate`` and ``test``.

    For every task the model answers freely (greedy decoding without constraints) and scores the expected answers.
    Schema-constrained answers have their own column. On the risk task three baselines answer the same questions:
    the majority class, a look-up by title and boosted trees, all fitted on training pairs. The table has 95 %
    intervals, because 50 findings leave an uncertainty of up to 14 points in either direction. The questions are
    divided over the ranks. All figures and answers are written to ``evaluation.json`` in the run directory
    (``evaluation_val.json`` and ``evaluation_test.json`` for those commands); figures, plots and a table of samples are
    logged. The random state and the training modes of the module do not change.

    After a fit the weights of the best checkpoint are measured, which ``analyze`` and ``export`` use too; without a
    best checkpoint, those of the last step. The heading of the column contains the step. A fit that resumes from a
    checkpoint reads the column of the untuned model from the run directory if the questions are the same.

    Args:
        tasks: names of the tasks to evaluate; None is all tasks of the data module.
        num_samples: questions per task.
        split: split of the questions in a fit; ``validate`` and ``test`` use their own.
        baseline_train_size: number of training pairs that the baselines are fitted on.
        max_new_tokens: limit of an answer, in tokens; None is one and a half times the longest expected answer.
        batch_size: sequences per batch. Larger batches are faster until the memory is full or, on a CPU, the
            arithmetic is the limit (at about 25).
        evaluate_untuned: whether to measure the untuned model.
        every_n_validations: number of validations of a fit between two measurements; None measures at the end only.
        forced_choice: whether to measure also the most likely severity after the beginning of the expected answer,
            without generation. This cheap figure is then logged after every validation of a fit.
        constrained: whether to measure schema-constrained answers of the tuned model, too; None means if llguidance is
            installed.
        max_preamble_tokens: an answer without ``{`` after this number of tokens is ended and counts as incomplete; None
            disables the check. It saves most of the time of the untuned model.
        num_printed: number of answered questions to print.
        balanced: whether each severity is equally frequent among the questions. The figures then do not reflect the
            frequencies of real scans.
    """

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        num_samples: int = 50,
        split: Literal["val", "test"] = "val",
        baseline_train_size: int = 2000,
        max_new_tokens: int | None = None,
        batch_size: int = 25,
        evaluate_untuned: bool = True,
        every_n_validations: int | None = None,
        forced_choice: bool = False,
        constrained: bool | None = None,
        max_preamble_tokens: int | None = None,
        num_printed: int = 1,
        balanced: bool = False,
    ) -> None:
        for name, value in (
            ("num_samples", num_samples), ("batch_size", batch_size), ("baseline_train_size", baseline_train_size),
            ("max_new_tokens", max_new_tokens), ("max_preamble_tokens", max_preamble_tokens), ("every_n_validations",
            every_n_validations),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"callbacks.Evaluation: {name}={value}: must be at least 1")
        self.split, self.evaluate_untuned, self.every_n_validations = split, evaluate_untuned, every_n_validations
        self.forced_choice, self.num_printed, self.balanced = forced_choice, num_printed, balanced
        self.evaluator = TaskEvaluator(max_new_tokens, batch_size, forced_choice, constrained, max_preamble_tokens)
        self.console = Console(width=None if sys.stdout.isatty() else 150)  # a log file is not cut at 80 columns
        self._sampling: dict[str, Any] = {
            "tasks": tasks, "num_samples": num_samples, "balanced": balanced, "baseline_train_size": baseline_train_size
        }  # fmt: skip
        self._run = Path()
        self._results: list[TaskResults] = []
        self._validations = 0
        self._checkpoint_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolves the run directory; called on all ranks."""
        self._run = run_directory(trainer)
        self._validations = 0
        self._checkpoint_step = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reads the step of the evaluated weights; ``validate`` and ``test`` do not set the trainer's step."""
        self._checkpoint_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the untuned model, or restores its column in a resumed fit."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._results = self._load_questions(trainer, self.split)
        if trainer.ckpt_path is not None:
            self._restore_untuned()
        elif self.evaluate_untuned:
            self._measure(trainer, pl_module, "untuned", {"step": 0})
            self._write(trainer, "evaluation.json")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures every ``every_n_validations`` validations of a fit, and once in ``validate``."""
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._measure_once(trainer, pl_module, "val")
        elif self.every_n_validations and self._results:
            self._validations += 1
            if self._validations % self.every_n_validations == 0:
                self._measure(trainer, pl_module, "tuned", {"step": trainer.global_step})
        elif self.forced_choice:
            self._log_forced_choice(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the model once."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._measure_once(trainer, pl_module, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the tuned model before Lightning moves it off the device; not after an interrupt."""
        if not self._results or trainer.interrupted:
            return
        with best_weights(trainer, pl_module) as about:
            self._measure(trainer, pl_module, "tuned", about, constrained=True)
        self._report(trainer, "evaluation.json")

    def _measure_once(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        self._results = self._load_questions(trainer, split)
        self._restore_untuned()  # of the fit that wrote the checkpoint
        checkpoint = {"checkpoint": Path(trainer.ckpt_path).name} if trainer.ckpt_path else {}
        about = {"step": self._step(trainer)} | checkpoint
        self._measure(trainer, pl_module, "this model", about, constrained=True)
        self._report(trainer, f"evaluation_{split}.json")

    def _load_questions(self, trainer: Trainer, split: str) -> list[TaskResults]:
        return load_questions(trainer.datamodule, split, **self._sampling)  # type: ignore[attr-defined]

    def _measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        heading: str,
        about: dict[str, Any],
        *,
        constrained: bool = False,
    ) -> None:
        options: dict[str, Any] = {"constrained": constrained, "console": self.console}
        for results in self.evaluator.evaluate(trainer, pl_module, self._results, heading, about, **options):
            log_results(trainer, results, heading, self._step(trainer))

    def _log_forced_choice(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for results in self._results:
            accuracy = self.evaluator.forced_choice_accuracy(trainer, pl_module, results)
            if accuracy is None:
                continue
            figures = {f"evaluation_{results.task.name}/forced_severity_accuracy": accuracy}
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def _report(self, trainer: Trainer, file: str) -> None:
        """Writes the file, prints tables and samples on rank zero, and releases the results."""
        self._write(trainer, file)
        if trainer.is_global_zero:
            for results in self._results:
                print_results(self.console, results, balanced=self.balanced, num_printed=self.num_printed)
        self._results = []

    def _write(self, trainer: Trainer, file: str) -> None:
        if trainer.is_global_zero:
            write_results(self._run / file, self._results, step=self._step(trainer))

    def _step(self, trainer: Trainer) -> int:
        fitting = trainer.state.fn == TrainerFn.FITTING
        return trainer.global_step if fitting or self._checkpoint_step is None else self._checkpoint_step

    def _restore_untuned(self) -> None:
        """Reads the untuned model's answers from the fit's evaluation of the same questions."""
        records = read_results(self._run / "evaluation.json")
        for results in self._results:
            results.load_column(records.get(results.task.name, {}), "untuned")
