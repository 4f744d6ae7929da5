"""Questions to a model, task by task: constrained, cut to the context by rule, and kept so that none is asked twice.

Answers go to a journal (JSON Lines) as they come, each under a digest of the model, the task, the settings and the
content. After an interrupt the same questions are read from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from datamodules.errors import UserError
from lightning_modules.generation.engine import generate_requests
from lightning_modules.generation.requests import GenerationOutput, GenerationRequest, LogitsConstraint

if TYPE_CHECKING:
    from datamodules.tasks.base import Task
    from datamodules.tokenization.chat_format import ChatFormat

Progress = Callable[[float], None]
MAX_NEW_TOKENS = {"risk": 256, "correlation": 512, "summary": 512, "triage": 1024, "remediation": 1024}


@dataclass(frozen=True)
class Response:
    """What the model wrote to one question.

    Attributes:
        text: the answer.
        complete: whether the model ended it; False: it ran into the token limit.
        prompt_tokens_cut: tokens of the content that did not fit the model's context.
    """

    text: str
    complete: bool
    prompt_tokens_cut: int = 0


class CachedGenerator:
    """Asks one model.

    Args:
        model: as in :func:`lightning_modules.generation.engine.generate_requests`.
        chat: of its tokenizer.
        identity: digest of the model, for the journal.
        batch_size: questions at once.
        constrained: whether a grammar keeps answers to the task's schema.
        max_new_tokens: limit of an answer for each task.
        journal: file of answers; None keeps none.

    Attributes:
        reused: answers that were taken from the journal.
    """

    def __init__(
        self,
        model: nn.Module,
        chat: ChatFormat,
        *,
        identity: str,
        batch_size: int = 16,
        constrained: bool = True,
        max_new_tokens: Mapping[str, int] = MAX_NEW_TOKENS,
        journal: Path | None = None,
    ) -> None:
        self.model, self.chat, self.identity = model, chat, identity
        self.batch_size, self.constrained, self.limits = batch_size, constrained, max_new_tokens
        self._journal, self._kept = journal, _read_journal(journal)
        self.reused = 0

    def __call__(
        self, questions: Sequence[tuple[Task, str]], progress: Progress = lambda share: None
    ) -> list[Response]:
        """Answers questions of any tasks together, equal ones once.

        Args:
            questions: task and content of each.
            progress: called with the share of what had to be asked.
        """
        keys = [self._key(task, content) for task, content in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._kept}
        self.reused += len(set(keys)) - len(missing)
        if missing:
            self._ask(list(missing), list(missing.values()), progress)
        return [self._kept[key] for key in keys]

    def _ask(self, keys: list[str], questions: list[tuple[Task, str]], progress: Progress) -> None:
        tasks = {id(task): task for task, _ in questions}
        constraints = {key: self._constraint(task) for key, task in tasks.items()}

        def keep(index: int, written: GenerationOutput) -> None:
            self._keep(keys[index], Response(written.text, written.stopped, written.prompt_tokens_cut))

        generate_requests(
            self.model,
            self.chat,
            [
                GenerationRequest(task, content, self.limits[task.name], constraints[id(task)])
                for task, content in questions
            ],
            batch_size=self.batch_size,
            progress=progress,
            on_answer=keep,
        )

    def _constraint(self, task: Task) -> LogitsConstraint | None:
        if not self.constrained:
            return None
        from lightning_modules.generation.constrained_decoding import JsonGrammar

        return JsonGrammar(self.chat.tokenizer, self.chat.eos_id, task.answer_schema)

    def _key(self, task: Task, content: str) -> str:
        settings = [self.identity, task.name, task.system, task.instruction, task.answer_schema, self.constrained]
        text = json.dumps([*settings, self.limits[task.name], content])
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _keep(self, key: str, reply: Response) -> None:
        self._kept[key] = reply
        if self._journal is None:
            return
        try:
            with self._journal.open("a", encoding="utf-8") as file:
                # the newline comes first: a line that was cut short ends there
                file.write("\n" + json.dumps({"key": key, **asdict(reply)}))
        except OSError as error:
            raise UserError(f"{self._journal}: {error.strerror or error}; choose another place for --output") from error


def _read_journal(journal: Path | None) -> dict[str, Response]:
    """Reads what is there; a line that an interrupt cut short is left out and asked again."""
    kept: dict[str, Response] = {}
    if journal is None or not journal.is_file():
        return kept
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            key = record.pop("key")
            kept[key] = Response(**record)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return kept
