"""Answers the questions of several analyses in shared batches.

An analysis asks in three steps that depend on each other, and a small report fills no batch. Each analysis runs in a
thread of its own until it asks; when all of them wait, the model answers all of their questions together in the calling
thread. The threads never use the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from datamodules.tasks.base import Task
    from lightning_modules.generation.response_cache import Progress, Response

T = TypeVar("T")
Questions = Sequence[tuple["Task", str]]
#: answers questions, for example a ``response_cache.CachedGenerator``
Generate = Callable[[Questions, "Progress"], list["Response"]]
#: opens a progress display; called with the names of the tasks and the number of questions
ShowProgress = Callable[[str, int], AbstractContextManager["Progress"]]


@dataclass(frozen=True, slots=True)
class _Message:
    """A message of an analysis at a position: its questions, its result or its error."""

    position: int
    questions: Questions | None = None
    result: Any = None
    error: BaseException | None = None


class _Stopped(Exception):
    """Ends the thread of an analysis whose answers will not come."""


def run_together(
    analyses: Sequence[Callable[[Generate], T]], generate: Generate, show_progress: ShowProgress
) -> list[T]:
    """Runs analyses at the same time.

    Args:
        analyses: each is called with the function that answers its questions.
        generate: answers questions with the model; it is called in the calling thread only.
        show_progress: opens the progress display of a shared batch.

    Returns:
        The results in the same order.

    Raises:
        BaseException: the first error of an analysis or of ``generate``, after all threads have ended.
    """
    inbox: SimpleQueue[_Message] = SimpleQueue()
    outboxes: list[SimpleQueue[list[Response] | None]] = [SimpleQueue() for _ in analyses]

    def work(index: int) -> None:
        def ask(questions: Questions, progress: Progress) -> list[Response]:
            inbox.put(_Message(index, questions=questions))
            responses = outboxes[index].get()
            if responses is None:
                raise _Stopped
            return responses

        try:
            inbox.put(_Message(index, result=analyses[index](ask)))
        except BaseException as error:  # it is raised again in the calling thread
            inbox.put(_Message(index, error=error))

    threads = [Thread(target=work, args=(index,), daemon=True) for index in range(len(analyses))]
    results: dict[int, T] = {}
    try:
        for thread in threads:
            thread.start()
        while waiting := _next_questions(inbox, results, len(analyses)):
            order = sorted(waiting)  # of the reports, so that the batches are the same in each run
            together = [question for index in order for question in waiting[index]]
            names = ", ".join(dict.fromkeys(task.name for task, _ in together))
            with show_progress(names, len(together)) as progress:
                responses = iter(generate(together, progress))
            for index in order:
                outboxes[index].put([next(responses) for _ in waiting[index]])
    finally:
        for outbox in outboxes:
            outbox.put(None)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return [results[index] for index in range(len(analyses))]


def _next_questions(inbox: SimpleQueue[_Message], results: dict[int, Any], count: int) -> dict[int, Questions]:
    """Waits until each of ``count`` analyses asks or is done; adds the results, and returns the questions."""
    waiting: dict[int, Questions] = {}
    while len(waiting) + len(results) < count:
        message = inbox.get()
        if message.error is not None:
            raise message.error
        if message.questions is None:
            results[message.position] = message.result
        else:
            waiting[message.position] = message.questions
    return waiting
