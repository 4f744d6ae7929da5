"""Asks the model the questions of several tasks, and counts the answers that are missing or invalid."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from datamodules.tasks.schemas import is_valid
from lightning_modules.evaluation.answer_parsing import parse

if TYPE_CHECKING:
    from datamodules.tasks.base import Schema, Task
    from lightning_modules.generation.response_cache import Progress, Response


class AnswerGenerator(Protocol):
    """A model that answers questions, for example a ``response_cache.CachedGenerator``."""

    def __call__(self, questions: Sequence[tuple[Task, str]], progress: Progress) -> list[Response]:
        """Returns one response for each question (task and content), in the same order."""


#: opens a progress display for tasks that run together; called with their names and the number of questions
ShowProgress = Callable[[str, int], AbstractContextManager["Progress"]]


@dataclass
class TaskCounts:
    """Counts of the questions and answers of one task.

    Attributes:
        asked: questions to the model.
        fallbacks: values computed by rule instead of an answer, by reason.
        prompts_cut: questions whose content did not fit the model's context.
        withheld: commands that were removed from answers.
    """

    asked: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    withheld: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts for the document; rare ones are left out if they are zero."""
        report: dict[str, Any] = {
            "asked": self.asked,
            "by_model": max(self.asked - self.fallbacks.total(), 0),
            "by_rule": dict(self.fallbacks),
        }
        rare = {"prompts_cut": self.prompts_cut, "commands_withheld": self.withheld}
        return report | {name: count for name, count in rare.items() if count}


class AnswerCollector:
    """Collects the valid answers of a model.

    Args:
        generator: the model.
        tasks: names of the tasks that the model answers.
        show_progress: opens the progress display of tasks; None shows nothing.

    Attributes:
        counts: counts of questions and answers by task.
    """

    def __init__(
        self, generator: AnswerGenerator, tasks: Sequence[str], show_progress: ShowProgress | None = None
    ) -> None:
        self.generator, self.tasks = generator, set(tasks)
        self.show_progress = show_progress or (lambda names, count: _no_progress())
        self.counts: dict[str, TaskCounts] = defaultdict(TaskCounts)

    def __call__(self, *asked: tuple[Task, list[str], Schema]) -> list[list[dict[str, Any] | None]]:
        """Returns the model's answers to the contents of each task; None for an answer that its schema does not allow.

        The tasks run together in one batch: the later tasks have few questions, and a batch of few takes as long as a
        full one.

        Args:
            *asked: task, contents and schema of the answers.
        """
        questions: list[tuple[Task, str]] = []
        for task, contents, _ in asked:
            counts = self.counts[task.name]
            if task.name in self.tasks:
                counts.asked += len(contents)
                questions += [(task, content) for content in contents]
            elif contents:
                counts.fallbacks["not a task of this model"] += len(contents)
        responses = iter(self._responses(questions))
        return [
            [self._parse(next(responses), schema, self.counts[task.name]) for _ in contents]
            if task.name in self.tasks
            else [None] * len(contents)
            for task, contents, schema in asked
        ]

    def _responses(self, questions: list[tuple[Task, str]]) -> list[Response]:
        if not questions:
            return []
        names = ", ".join(dict.fromkeys(task.name for task, _ in questions))
        with self.show_progress(names, len(questions)) as progress:
            return self.generator(questions, progress)

    @staticmethod
    def _parse(response: Response, schema: Schema, counts: TaskCounts) -> dict[str, Any] | None:
        counts.prompts_cut += response.prompt_tokens_cut > 0
        answer = parse(response.text.strip())
        if answer is not None and is_valid(answer, schema):
            return answer
        counts.fallbacks["cut at the token limit" if not response.complete else "no valid answer"] += 1
        return None


def _no_progress() -> AbstractContextManager[Progress]:
    return nullcontext(lambda share: None)
