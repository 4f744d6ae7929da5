"""What the model is worth before and after training, beside baselines: one table, one analysed finding, one file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console

from callbacks.paths import run_folder
from callbacks.reporting.figures import pictures
from callbacks.reporting.tables import by_category, comparison, markdown, sample
from callbacks.task_progress import TaskProgress
from datamodules.errors import UserError
from lightning_modules.evaluation.baselines import MajorityClass, TitleLookup, input_determined_categories
from lightning_modules.evaluation.boosted_trees import BoostedTrees
from lightning_modules.evaluation.evaluate import PredictionResult, answer_pairs, forced_severities, token_limit
from lightning_modules.evaluation.results import TaskResults, read_results, write_results
from lightning_modules.generation.encoded_pairs import EncodedPairs
from lightning_modules.models.backend import backend_of

BASELINES = (MajorityClass, TitleLookup, BoostedTrees)  #: of the risk task


class Evaluation(Callback):
    """Measures the model on held-out findings when a fit starts and when it ends, and in ``validate`` and ``test``.

    For every task the model answers freely (greedy, nothing constrains it) and scores the expected answers; with a
    column of their own, answers that a grammar holds to the task's schema. On the risk task majority class, look-up by
    title and boosted trees, fitted on training pairs, answer the same questions. The table has 95 % intervals, since 50
    findings leave up to 14 points either way. Ranks share the questions. All numbers and answers go to
    ``evaluation.json`` in the run folder (``evaluation_val.json`` and ``evaluation_test.json`` for those
    commands), figures, pictures and a table of samples to the logger. The random state and the module's modes stay as
    they were.

    After a fit the weights of the best checkpoint are measured where there is one (those that ``analyze`` and
    ``export`` take), else the last step's; the column says which. A fit that goes on from a checkpoint takes the
    untuned model's column from the run folder, if the questions are still the same.

    Args:
        tasks: which tasks of the data module to ask about; None is all.
        num_samples: questions a task.
        split: where they come from in a fit; ``validate`` and ``test`` take their own.
        baseline_train_size: training pairs that the baselines are fitted on.
        max_new_tokens: limit of an answer; None is one and a half times the longest expected one.
        batch_size: rows at once; more are faster until memory or (on a CPU, at about 25) arithmetic runs out.
        evaluate_untuned: whether to measure the untuned model.
        every_n_validations: also measure within a fit, after every so many validations; None is never.
        forced_choice: whether to measure also which severity is most likely behind the expected answer's beginning,
            without generation; and to log this cheap figure after every validation of a fit.
        constrained: whether to measure grammar-held answers of the tuned model too; None is where llguidance is
            installed.
        max_preamble_tokens: an answer that has no ``{`` after so many tokens is ended there and counts as cut; None
            waits for the limit. It saves most of the untuned model's time.
        num_printed: analysed findings to print.
        balanced: whether the questions hold equally many of each severity; the figures then say nothing of the
            frequencies that real scans have.
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
                raise ValueError(f"{name} {value} is less than 1")
        self.tasks, self.num_samples, self.split, self.baseline_train_size = (
            tasks,
            num_samples,
            split,
            baseline_train_size,
        )
        self.max_new_tokens, self.batch_size, self.evaluate_untuned = max_new_tokens, batch_size, evaluate_untuned
        self.every_n_validations, self.forced_choice, self.num_printed = every_n_validations, forced_choice, num_printed
        self.constrained, self.max_preamble_tokens, self.balanced = constrained, max_preamble_tokens, balanced
        self.console = Console(width=None if sys.stdout.isatty() else 150)  # a log is not cut at 80 columns
        self._run = Path()
        self._exams: list[TaskResults] = []
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
            self._remember()
        elif self.evaluate_untuned:
            self._measure(trainer, pl_module, "untuned", {"step": 0})
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
                self._measure(trainer, pl_module, "tuned", {"step": trainer.global_step})
        elif self.forced_choice:
            self._force(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures once."""
        if not self._skipped(trainer, pl_module):
            self._measure_once(trainer, pl_module, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the tuned model; before Lightning moves it off the device, and not after an interrupt."""
        if not self._exams or trainer.interrupted:
            return
        with best_weights(trainer, pl_module) as about:
            self._measure(trainer, pl_module, "tuned", about, held=True)
        self._report(trainer, "evaluation.json")
        self._exams = []

    def _measure_once(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        self._exams = self._questions(trainer, split)
        self._remember()  # of the fit that made the checkpoint
        checkpoint = {"checkpoint": Path(trainer.ckpt_path).name} if trainer.ckpt_path else {}
        self._measure(trainer, pl_module, "this model", {"step": trainer.global_step} | checkpoint, held=True)
        self._report(trainer, f"evaluation_{split}.json")
        self._exams = []

    def _skipped(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

    def _questions(self, trainer: Trainer, split: str) -> list[TaskResults]:
        """Reads the questions, and lets the baselines answer those of the risk task.

        Raises:
            UserError: there is no data module, it offers no such task, or the split holds no pair of it.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "pairs"):
            raise UserError(
                "callbacks.Evaluation: needs a data module with pairs (FindingsDataModule); leave it out here"
            )
        exams: list[TaskResults] = []
        for name in data.tasks if self.tasks is None else self.tasks:
            if name not in data.tasks:
                raise UserError(
                    f"callbacks.Evaluation tasks: {name!r} is none of {', '.join(data.tasks)}; add it to data"
                )
            pairs = data.pairs(split, name, self.num_samples, balanced=self.balanced)
            if not pairs and self.tasks is None and exams:
                rank_zero_warn(f"callbacks.Evaluation: the {split} split holds no pair of {name}; it is left out")
                continue
            if not pairs:
                raise UserError(f"callbacks.Evaluation: the {split} split holds no pair of {name}; raise data.{split}")
            exam = TaskResults(data.tasks[name], split, pairs)
            if name == "risk":
                _add_baselines(exam, data.pairs("train", name, self.baseline_train_size))
            exams.append(exam)
        return exams

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, heading: str, about: dict[str, Any], held: bool = False
    ) -> None:
        """Lets the model answer every question, each rank its share, and logs the figures."""
        rank, ranks = trainer.global_rank, trainer.world_size
        if held and self.constrained is None and find_spec("llguidance") is None:
            rank_zero_info("answers held to the schema are not measured: pip install llguidance")
        console = self.console if trainer.is_global_zero else None
        backend = backend_of(trainer)
        model = backend.generation_model(pl_module.model)  # type: ignore[arg-type]
        for exam in self._exams:
            started, data = time.monotonic(), trainer.datamodule  # type: ignore[attr-defined]
            encoded = EncodedPairs.encode(data.chat, exam.task, exam.pairs)
            limit = self.max_new_tokens or token_limit(encoded)  # the same on all ranks
            with (
                TaskProgress(f"{heading}: {len(exam.pairs)} {exam.task.name} answers", console) as gauge,
                backend.uneven_forward_context(model),
                trainer.precision_plugin.forward_context(),
            ):
                outcomes = answer_pairs(
                    model,
                    encoded[rank::ranks],
                    max_new_tokens=limit,
                    batch_size=self.batch_size,
                    forced=self.forced_choice,
                    constraint=self._grammar(data.chat, exam.task) if held else None,
                    max_preamble_tokens=self.max_preamble_tokens,
                    progress=gauge,
                )
            outcomes = _gather(outcomes, rank, ranks)
            exam.add(heading, outcomes)
            exam.seconds[heading], exam.about[heading] = round(time.monotonic() - started, 1), about
            if all(item.constrained for item in outcomes):
                name = f"{heading}, constrained"
                exam.add(name, [item.constrained for item in outcomes if item.constrained])
                exam.about[name] = about
            self._log(trainer, exam, heading)
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()  # rows of other lengths than training's would leave the memory in pieces

    def _force(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs forced-choice accuracy within a fit: what generation would say, at a tenth of its price."""
        rank, ranks, chat = trainer.global_rank, trainer.world_size, trainer.datamodule.chat  # type: ignore[attr-defined]
        for exam in self._exams:
            pairs: list[Any] = exam.pairs[rank::ranks]
            model: Any = pl_module.model
            with backend_of(trainer).uneven_forward_context(model), trainer.precision_plugin.forward_context():
                mine = forced_severities(model, EncodedPairs.encode(chat, exam.task, pairs), batch_size=self.batch_size)
            said = _gather([PredictionResult("", forced=severity) for severity in mine], rank, ranks)
            right = [item.forced == p.severity for item, p in zip(said, exam.pairs, strict=True) if item.forced]
            if right:
                figures = {f"evaluation_{exam.task.name}/forced_severity_accuracy": sum(right) / len(right)}
                for logger in trainer.loggers:
                    logger.log_metrics(figures, step=trainer.global_step)

    def _grammar(self, chat: Any, task: Any) -> Any:
        if self.constrained is False or (self.constrained is None and find_spec("llguidance") is None):
            return None
        from lightning_modules.generation.constrained_decoding import JsonGrammar

        return JsonGrammar(chat.tokenizer, chat.eos_id, task.answer_schema)

    def _log(self, trainer: Trainer, exam: TaskResults, heading: str) -> None:
        prefix, scores = f"evaluation_{exam.task.name}", exam.columns[heading]
        figures = {f"{prefix}/{name}": value for name, value in scores.figures.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text(f"{prefix}/samples", markdown(exam.pairs, exam.models), trainer.global_step)
                for name, figure in pictures(scores).items():
                    logger.experiment.add_figure(f"{prefix}/{name}", figure, trainer.global_step)

    def _report(self, trainer: Trainer, file: str) -> None:
        """Prints tables and samples and writes the file; rank zero only."""
        self._write(trainer, file)
        if not trainer.is_global_zero:
            return
        for exam in self._exams:
            kind = "balanced over severity" if self.balanced else "as frequent as in the data"
            title = f"{exam.task.name}: {len(exam.pairs)} held-out pairs ({exam.split}, {kind}), greedy generation"
            self.console.print(comparison(title, exam.columns, exam.about))
            if exam.task.name == "risk":
                self.console.print(by_category(exam.columns, exam.input_determined))
            for index in range(min(self.num_printed, len(exam.pairs))):
                texts = {name: scores.outcomes[index].text for name, scores in exam.models.items()}
                self.console.print(sample(exam.pairs[index], texts), soft_wrap=True)

    def _write(self, trainer: Trainer, file: str) -> None:
        if trainer.is_global_zero:
            write_results(self._run / file, self._exams, step=trainer.global_step)

    def _remember(self) -> None:
        """Takes the untuned model's answers from the fit's evaluation of the same questions."""
        records = read_results(self._run / "evaluation.json")
        for exam in self._exams:
            exam.load_column(records.get(exam.task.name, {}), "untuned")


@contextmanager
def best_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[dict[str, Any]]:
    """Puts the best checkpoint's trainable weights in place meanwhile, where there is one.

    Yields:
        ``step`` of the weights, and ``checkpoint``, its file name, where they are not the last step's.
    """
    callback = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
    path = Path(callback.best_model_path) if callback is not None and callback.best_model_path else None
    if path is None or callback is None or callback.best_model_score is None or not path.is_file():
        yield {"step": trainer.global_step}
        return
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    about = {"step": checkpoint["global_step"], "checkpoint": path.name}
    if about["step"] == trainer.global_step:
        yield about
        return
    trained = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
    last = {name: parameter.detach().clone() for name, parameter in trained.items()}
    try:  # by the strategy, which may have divided them
        trainer.strategy.load_model_state_dict(checkpoint, strict=False)
        yield about
    finally:
        trainer.strategy.load_model_state_dict({"state_dict": last}, strict=False)


def _add_baselines(exam: TaskResults, training: list[Any]) -> None:
    exam.input_determined = input_determined_categories(training)
    for kind in BASELINES:
        try:
            baseline = kind(training)
        except UserError as error:  # a package is missing
            rank_zero_warn(f"{error}; it is left out")
            continue
        exam.add(baseline.name, [PredictionResult(baseline(pair.content)) for pair in exam.pairs], baseline=True)


def _gather(mine: list[PredictionResult], rank: int, ranks: int) -> list[PredictionResult]:
    """Brings every rank's outcomes together on all ranks, in the questions' order."""
    if ranks == 1:
        return mine
    everybody: list[list[PredictionResult]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(everybody, mine)
    total = sum(map(len, everybody))
    return [everybody[index % ranks][index // ranks] for index in range(total)]
