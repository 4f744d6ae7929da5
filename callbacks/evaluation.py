"""What the model is worth before and after training, beside baselines: one table, one analysed finding, one file."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from callbacks.folders import run_folder
from callbacks.gauge import Gauge
from callbacks.report_table import comparison, markdown, sample
from datamodules.errors import UserError
from lightning_modules.baselines import MajorityClass, TitleLookup
from lightning_modules.evaluation import Outcome, Scores, answer_pairs, score, token_limit

if TYPE_CHECKING:
    from datamodules.tasks.prompts import Pair, Task

BASELINES = (MajorityClass, TitleLookup)  #: of the risk task


@dataclass
class _Exam:
    """The questions of one task and everybody's answers so far.

    Attributes:
        task: what is asked.
        split: where the pairs come from.
        pairs: the questions, held out.
        columns: heading -> scores, in the table's order.
        seconds: heading -> how long the model took.
    """

    task: Task
    split: str
    pairs: list[Pair]
    columns: dict[str, Scores] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of the questions and expected answers: only columns of the same one can be compared."""
        text = json.dumps([[pair.content, pair.completion] for pair in self.pairs])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Evaluation(Callback):
    """Measures the model on held-out findings when a fit starts and when it ends, and in ``validate`` and ``test``.

    The model answers freely (greedy, nothing constrains it) and scores the expected answers; majority class and a
    look-up by title, fitted on training pairs, answer the same questions. The table has 95 % intervals, since 50
    findings leave up to 14 points either way. Ranks share the questions. All numbers and answers go to
    ``evaluation.json`` in the run folder (``evaluation_validate.json`` and ``evaluation_test.json`` for those
    commands), the figures and a table of samples to the logger. The random state and the module's modes stay as they
    were.

    After a fit the weights of its last step are measured, not the best checkpoint's. A fit that goes on from a
    checkpoint takes the column of the untuned model from the run folder, if the questions are still the same.

    Args:
        tasks: which tasks of the data module to ask about.
        samples: questions a task.
        split: where they come from in a fit; ``validate`` and ``test`` take their own.
        reference: training pairs that the baselines are fitted on.
        max_new_tokens: limit of an answer; None is one and a half times the longest expected one.
        batch_size: rows at once; more are faster until memory or (on a CPU, at about 25) arithmetic runs out.
        before: whether to measure the untuned model.
        every_n_validations: also measure within a fit, after every so many validations; None is never.
        forced_choice: whether to measure also which severity is most likely without generation (risk task).
        show: analysed findings to print.
        balanced: whether the questions hold equally many of each severity; the figures then say nothing of the
            frequencies that real scans have.
    """

    def __init__(
        self,
        tasks: Sequence[str] = ("risk",),
        samples: int = 50,
        split: Literal["val", "test"] = "val",
        reference: int = 2000,
        max_new_tokens: int | None = None,
        batch_size: int = 25,
        before: bool = True,
        every_n_validations: int | None = None,
        forced_choice: bool = False,
        show: int = 1,
        balanced: bool = False,
    ) -> None:
        for name, value in (("samples", samples), ("batch_size", batch_size), ("reference", reference)):
            if value < 1:
                raise ValueError(f"{name} {value} is less than 1")
        self.tasks, self.samples, self.split, self.reference = list(tasks), samples, split, reference
        self.max_new_tokens, self.batch_size, self.before = max_new_tokens, batch_size, before
        self.every_n_validations, self.forced_choice, self.show = every_n_validations, forced_choice, show
        self.balanced = balanced
        self.console = Console()
        self._run = Path()
        self._exams: list[_Exam] = []
        self._validations = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the run folder, on every rank."""
        self._run = run_folder(trainer)
        self._validations = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the untuned model, or remembers what it was worth."""
        if self._skipped(trainer, pl_module):
            return
        self._exams = self._questions(trainer, self.split)
        if trainer.ckpt_path is not None:
            self._remember("evaluation.json")
        elif self.before:
            self._measure(trainer, pl_module, "untuned")
            self._write(trainer, "evaluation.json")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures within a fit now and then, and once in ``validate``."""
        if trainer.sanity_checking or self._skipped(trainer, pl_module):
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._measure_once(trainer, pl_module, "val")
        elif self.every_n_validations and self._exams:
            self._validations += 1
            if self._validations % self.every_n_validations == 0:
                self._measure(trainer, pl_module, "tuned")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures once."""
        if not self._skipped(trainer, pl_module):
            self._measure_once(trainer, pl_module, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the tuned model; before Lightning moves it off the device, and not after an interrupt."""
        if not self._exams or trainer.interrupted:
            return
        self._measure(trainer, pl_module, "tuned")
        self._report(trainer, "evaluation.json")
        self._exams = []

    def _measure_once(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        self._exams = self._questions(trainer, split)
        self._remember("evaluation.json")  # of the fit that made the checkpoint
        self._measure(trainer, pl_module, "this model")
        self._report(trainer, f"evaluation_{split}.json")
        self._exams = []

    def _skipped(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        if pl_module.device.type == "xla":
            rank_zero_warn("Evaluation is left out on XLA: every length of an answer would be compiled anew")
            return True
        return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

    def _questions(self, trainer: Trainer, split: str) -> list[_Exam]:
        """Reads the questions, and lets the baselines answer those of the risk task.

        Raises:
            UserError: there is no data module, it offers no such task, or the split holds no pair of it.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "pairs"):
            raise UserError(
                "callbacks.Evaluation: needs a data module with pairs (FindingsDataModule); leave it out here"
            )
        exams = []
        for name in self.tasks:
            if name not in data.tasks:
                raise UserError(
                    f"callbacks.Evaluation tasks: {name!r} is none of {', '.join(data.tasks)}; add it to data"
                )
            pairs = data.pairs(split, name, self.samples, balanced=self.balanced)
            if not pairs:
                raise UserError(f"callbacks.Evaluation: the {split} split holds no pair of {name}; raise data.{split}")
            exam = _Exam(data.tasks[name], split, pairs)
            if name == "risk":
                training = data.pairs("train", name, self.reference)
                for baseline in (kind(training) for kind in BASELINES):
                    exam.columns[baseline.name] = score(exam.task, pairs, [Outcome(baseline(p.content)) for p in pairs])
            exams.append(exam)
        return exams

    def _measure(self, trainer: Trainer, pl_module: LightningModule, heading: str) -> None:
        """Lets the model answer every question, each rank its share, and logs the figures."""
        rank, ranks = trainer.global_rank, trainer.world_size
        console = self.console if trainer.is_global_zero else None
        for exam in self._exams:
            started, data = time.monotonic(), trainer.datamodule  # type: ignore[attr-defined]
            limit = self.max_new_tokens or token_limit(data.chat, exam.task, exam.pairs)  # the same on all ranks
            with (
                Gauge(f"{heading}: {len(exam.pairs)} {exam.task.name} answers", console) as gauge,
                trainer.precision_plugin.forward_context(),
            ):
                outcomes = answer_pairs(
                    pl_module.model,  # type: ignore[arg-type]
                    data.chat,
                    exam.task,
                    exam.pairs[rank::ranks],
                    max_new_tokens=limit,
                    batch_size=self.batch_size,
                    forced=self.forced_choice and exam.task.name == "risk",
                    progress=gauge,
                )
            scores = score(exam.task, exam.pairs, _gather(outcomes, rank, ranks))
            exam.columns = {name: old for name, old in exam.columns.items() if name != heading}
            exam.columns = _ordered(exam.columns | {heading: scores})
            exam.seconds[heading] = round(time.monotonic() - started, 1)
            self._log(trainer, exam, heading)
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()  # rows of other lengths than training's would leave the memory in pieces

    def _log(self, trainer: Trainer, exam: _Exam, heading: str) -> None:
        prefix, scores = f"evaluation_{exam.task.name}", exam.columns[heading]
        figures = {f"{prefix}/{name}": value for name, value in scores.figures.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                models = {name: column for name, column in exam.columns.items() if name in exam.seconds}
                logger.experiment.add_text(f"{prefix}/samples", markdown(exam.pairs, models), trainer.global_step)

    def _report(self, trainer: Trainer, file: str) -> None:
        """Prints tables and samples and writes the file; rank zero only."""
        self._write(trainer, file)
        if not trainer.is_global_zero:
            return
        for exam in self._exams:
            kind = "balanced over severity" if self.balanced else "as frequent as in the data"
            title = f"{exam.task.name}: {len(exam.pairs)} held-out pairs ({exam.split}, {kind}), free greedy generation"
            self.console.print(comparison(title, exam.columns))
            models = {name: scores for name, scores in exam.columns.items() if name not in _BASELINE_NAMES}
            for index in range(min(self.show, len(exam.pairs))):
                texts = {name: scores.outcomes[index].text for name, scores in models.items()}
                self.console.print(sample(exam.pairs[index], texts), soft_wrap=True)

    def _write(self, trainer: Trainer, file: str) -> None:
        if not trainer.is_global_zero:
            return
        self._run.mkdir(parents=True, exist_ok=True)
        record = {exam.task.name: _record(exam) for exam in self._exams}
        unfinished = self._run / f"{file}.unfinished"
        text = json.dumps({"step": trainer.global_step, "tasks": record}, indent=1, ensure_ascii=False, allow_nan=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self._run / file)

    def _remember(self, file: str) -> None:
        """Takes the untuned model's answers from an earlier evaluation of the same questions."""
        try:
            tasks = json.loads((self._run / file).read_text(encoding="utf-8"))["tasks"]
        except (OSError, ValueError, KeyError):
            return
        for exam in self._exams:
            earlier = tasks.get(exam.task.name, {})
            column = earlier.get("columns", {}).get("untuned")
            if column is None or earlier.get("digest") != exam.digest:
                continue
            outcomes = [
                Outcome(**item | {"nll": math.nan if item["nll"] is None else item["nll"]})
                for item in column["outcomes"]
            ]
            exam.columns = _ordered(exam.columns | {"untuned": score(exam.task, exam.pairs, outcomes)})
            exam.seconds["untuned"] = column["seconds"]


_BASELINE_NAMES = [baseline.name for baseline in BASELINES]


def _ordered(columns: dict[str, Scores]) -> dict[str, Scores]:
    """Models first, the untuned one before all; then the baselines."""
    names = sorted(columns, key=lambda name: (name in _BASELINE_NAMES, name != "untuned"))
    return {name: columns[name] for name in names}


def _gather(mine: list[Outcome], rank: int, ranks: int) -> list[Outcome]:
    """Brings every rank's outcomes together on all ranks, in the questions' order."""
    if ranks == 1:
        return mine
    everybody: list[list[Outcome]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(everybody, mine)
    total = sum(map(len, everybody))
    return [everybody[index % ranks][index // ranks] for index in range(total)]


def _record(exam: _Exam) -> dict[str, Any]:
    """An exam as JSON; NaN becomes null."""
    return {
        "split": exam.split, "n": len(exam.pairs), "digest": exam.digest,
        "columns": {
            name: {
                "figures": {key: _finite(value) for key, value in scores.figures.items()},
                "intervals": {key: [_finite(low), _finite(high)] for key, (low, high) in scores.intervals.items()},
                "confusion": scores.confusion,
                "seconds": exam.seconds.get(name),
                "outcomes": [vars(item) | {"nll": _finite(item.nll)} for item in scores.outcomes],
            }
            for name, scores in exam.columns.items()
        },
        "questions": [{"content": pair.content, "expected": pair.completion} for pair in exam.pairs],
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
