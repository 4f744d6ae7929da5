"""Measurement of a model on held-out pairs of each task, divided over the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.task_progress import TaskProgress
from datamodules.errors import UserError
from lightning_modules.evaluation.baselines import MajorityClass, TitleLookup, input_determined_categories
from lightning_modules.evaluation.boosted_trees import BoostedTrees
from lightning_modules.evaluation.evaluate import PredictionResult, answer_pairs, forced_severities, token_limit
from lightning_modules.evaluation.results import TaskResults
from lightning_modules.generation.encoded_pairs import EncodedPairs
from lightning_modules.models.backend import backend_of

if TYPE_CHECKING:
    from rich.console import Console

    from datamodules.tasks.base import Pair

BASELINES = (MajorityClass, TitleLookup, BoostedTrees)  #: of the risk task


def load_questions(
    data: Any,
    split: str,
    *,
    tasks: Sequence[str] | None,
    num_samples: int,
    balanced: bool,
    baseline_train_size: int,
) -> list[TaskResults]:
    """Reads the held-out pairs of each task, and adds the answers of the baselines on the risk task.

    Args:
        data: data module with ``tasks`` and ``pairs``.
        split: split of the pairs.
        tasks: names of the tasks; None is all tasks of the data module.
        num_samples: largest number of pairs per task.
        balanced: whether each severity is equally frequent.
        baseline_train_size: number of training pairs that the baselines are fitted on.

    Raises:
        UserError: the data module has no pairs or no such task, or the split has no pair of it.
    """
    if not hasattr(data, "pairs"):
        raise UserError(
            "callbacks.Evaluation: the data module has no pairs. Fix: use FindingsDataModule, or remove the callback"
        )
    loaded: list[TaskResults] = []
    for name in data.tasks if tasks is None else tasks:
        if name not in data.tasks:
            raise UserError(
                f"callbacks.Evaluation: tasks={name!r}: must be one of {', '.join(data.tasks)}. "
                "Fix: add it to data.task_weights"
            )
        pairs = data.pairs(split, name, num_samples, balanced=balanced)
        if not pairs and tasks is None and loaded:
            rank_zero_warn(f"callbacks.Evaluation: skipping task {name}: the {split} split has no pair of it")
            continue
        if not pairs:
            raise UserError(
                f"callbacks.Evaluation: the {split} split has no pair of {name}. Fix: raise data.{split}_fraction"
            )
        results = TaskResults(data.tasks[name], split, pairs)
        if name == "risk":
            _add_baselines(results, data.pairs("train", name, baseline_train_size))
        loaded.append(results)
    return loaded


@dataclass(frozen=True)
class TaskEvaluator:
    """Lets a model answer held-out pairs and scores the answers. Each rank answers its share of the pairs.

    Args:
        max_new_tokens: limit of an answer, in tokens; None is one and a half times the longest expected answer.
        batch_size: sequences per batch.
        forced_choice: whether to measure the most likely severity without generation, too.
        constrained: whether to measure schema-constrained answers, too; None means if llguidance is installed.
        max_preamble_tokens: an answer without ``{`` after this number of tokens is ended; None disables the check.
    """

    max_new_tokens: int | None
    batch_size: int
    forced_choice: bool
    constrained: bool | None
    max_preamble_tokens: int | None

    def evaluate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        tasks: Sequence[TaskResults],
        heading: str,
        about: dict[str, Any],
        *,
        constrained: bool = False,
        console: Console | None = None,
    ) -> Iterator[TaskResults]:
        """Measures the model on each task and adds a column to its results.

        Args:
            trainer: ranks, precision and strategy.
            pl_module: module with the ``model``.
            tasks: questions of each task; they get the new column.
            heading: heading of the column.
            about: step and checkpoint of the measured weights.
            constrained: whether to add a column of schema-constrained answers, too.
            console: shows the progress on rank zero; None shows nothing.

        Yields:
            The results of each task as soon as they are complete, so that they can be logged before the next task.
        """
        constrained = constrained and self._constrained_available()
        backend, chat = backend_of(trainer), trainer.datamodule.chat  # type: ignore[attr-defined]
        model = backend.generation_model(pl_module.model)  # type: ignore[arg-type]
        shown = console if trainer.is_global_zero else None
        for results in tasks:
            task, pairs, started = results.task, results.pairs, time.monotonic()
            encoded = EncodedPairs.encode(chat, task, pairs)
            limit = self.max_new_tokens or token_limit(encoded)  # of all pairs, so equal on all ranks
            with (
                TaskProgress(f"{heading}: {len(pairs)} {task.name} answers", shown) as progress,
                backend.uneven_forward_context(model),
                trainer.precision_plugin.forward_context(),
            ):
                predictions = answer_pairs(
                    model,
                    encoded[trainer.global_rank :: trainer.world_size],
                    max_new_tokens=limit,
                    batch_size=self.batch_size,
                    forced=self.forced_choice,
                    constraint=_json_grammar(chat, task) if constrained else None,
                    max_preamble_tokens=self.max_preamble_tokens,
                    progress=progress,
                )
            outcomes = gather_predictions(predictions, trainer.global_rank, trainer.world_size)
            results.add(heading, outcomes)
            results.seconds[heading], results.about[heading] = round(time.monotonic() - started, 1), about
            if all(item.constrained for item in outcomes):
                name = f"{heading}, constrained"
                results.add(name, [item.constrained for item in outcomes if item.constrained])
                results.about[name] = about
            yield results
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()  # sequences of other lengths than in training would fragment the memory

    def forced_choice_accuracy(
        self, trainer: Trainer, pl_module: LightningModule, results: TaskResults
    ) -> float | None:
        """Returns the accuracy of the most likely severity, at about a tenth of the time of generation.

        Args:
            trainer: ranks, precision and strategy.
            pl_module: module with the ``model``.
            results: questions of the task; no column is added.

        Returns:
            A value in 0..1; None for a task without severity.
        """
        rank, ranks = trainer.global_rank, trainer.world_size
        chat, model = trainer.datamodule.chat, pl_module.model  # type: ignore[attr-defined]
        encoded = EncodedPairs.encode(chat, results.task, results.pairs[rank::ranks])
        with backend_of(trainer).uneven_forward_context(model), trainer.precision_plugin.forward_context():  # type: ignore[arg-type]
            severities = forced_severities(model, encoded, batch_size=self.batch_size)  # type: ignore[arg-type]
        predictions = gather_predictions([PredictionResult("", forced=s) for s in severities], rank, ranks)
        correct = [p.forced == pair.severity for p, pair in zip(predictions, results.pairs, strict=True) if p.forced]
        return sum(correct) / len(correct) if correct else None

    def _constrained_available(self) -> bool:
        if self.constrained is not None:
            return self.constrained
        installed = find_spec("llguidance") is not None
        if not installed:
            rank_zero_info("Skipping constrained evaluation: llguidance is not installed. Fix: pip install llguidance")
        return installed


def gather_predictions(own: list[PredictionResult], rank: int, ranks: int) -> list[PredictionResult]:
    """Gathers the predictions of all ranks on every rank, in the order of the questions.

    Args:
        own: predictions of this rank for the questions ``rank::ranks``.
        rank: global rank of this process.
        ranks: number of processes.
    """
    if ranks == 1:
        return own
    of_ranks: list[list[PredictionResult]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(of_ranks, own)
    total = sum(map(len, of_ranks))
    return [of_ranks[index % ranks][index // ranks] for index in range(total)]


def _json_grammar(chat: Any, task: Any) -> Any:
    """Returns the grammar of a task's answers; None for answers that are plain text."""
    if task.answer_schema.get("type") == "string":
        return None
    from lightning_modules.generation.constrained_decoding import JsonGrammar

    return JsonGrammar(chat.tokenizer, chat.eos_id, task.answer_schema)


def _add_baselines(results: TaskResults, training: list[Pair]) -> None:
    results.input_determined = input_determined_categories(training)
    for kind in BASELINES:
        baseline: Callable[[str], str]
        try:
            baseline = kind(training)
        except UserError as error:  # an optional package is not installed
            rank_zero_warn(f"callbacks.Evaluation: skipping a baseline: {error}")
            continue
        results.add(kind.name, [PredictionResult(baseline(pair.content)) for pair in results.pairs], baseline=True)
