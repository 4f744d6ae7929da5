"""Generates a model's responses for several tasks, and caches them so that no prompt is answered twice.

Responses are appended to a cache file (JSON Lines) as they are generated. The key of each is a digest of the model, the
task, the settings and the content. After an interrupt, the responses to the same prompts are read from the file.
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
    """A model's response to one prompt.

    Attributes:
        text: the response.
        complete: True if the model ended it; False if it was cut at the token limit.
        prompt_tokens_cut: tokens of the content that did not fit the model's context.
    """

    text: str
    complete: bool
    prompt_tokens_cut: int = 0


class CachedGenerator:
    """Generates responses with one model and caches them.

    Args:
        model: as in :func:`lightning_modules.generation.engine.generate_requests`.
        chat: chat format of the model's tokenizer.
        identity: digest of the model, part of each cache key.
        batch_size: prompts per step.
        constrained: True constrains responses to the task's schema by a grammar.
        max_new_tokens: largest number of tokens of a response, per task.
        cache_file: the response cache file; None caches in memory only.

    Attributes:
        responses: all cached responses by key.
        reused: number of responses that were taken from the cache.
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
        cache_file: Path | None = None,
    ) -> None:
        self.model, self.chat, self.identity = model, chat, identity
        self.batch_size, self.constrained, self.limits = batch_size, constrained, max_new_tokens
        self._cache_file = cache_file
        self.responses = _read_responses(cache_file)
        self.reused = 0

    def __call__(
        self, questions: Sequence[tuple[Task, str]], progress: Progress = lambda share: None
    ) -> list[Response]:
        """Returns the responses to prompts of any tasks, generated together; equal prompts are answered once.

        Args:
            questions: task and content of each prompt.
            progress: called with the fraction of the missing responses that are done.
        """
        keys = [self._key(task, content) for task, content in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.responses}
        self.reused += len(set(keys)) - len(missing)
        if missing:
            self._generate(list(missing), list(missing.values()), progress)
        return [self.responses[key] for key in keys]

    def _generate(self, keys: list[str], questions: list[tuple[Task, str]], progress: Progress) -> None:
        tasks = {id(task): task for task, _ in questions}
        constraints = {key: self._constraint(task) for key, task in tasks.items()}

        def store(index: int, output: GenerationOutput) -> None:
            self._store(keys[index], Response(output.text, output.stopped, output.prompt_tokens_cut))

        generate_requests(
            self.model,
            self.chat,
            [
                GenerationRequest(task, content, self.limits[task.name], constraints[id(task)])
                for task, content in questions
            ],
            batch_size=self.batch_size,
            progress=progress,
            on_answer=store,
        )

    def _constraint(self, task: Task) -> LogitsConstraint | None:
        if not self.constrained or task.answer_schema.get("type") == "string":  # plain text has no grammar
            return None
        from lightning_modules.generation.constrained_decoding import JsonGrammar

        return JsonGrammar(self.chat.tokenizer, self.chat.eos_id, task.answer_schema)

    def _key(self, task: Task, content: str) -> str:
        settings = [self.identity, task.name, task.system, task.instruction, task.answer_schema, self.constrained]
        text = json.dumps([*settings, self.limits[task.name], content])
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _store(self, key: str, response: Response) -> None:
        self.responses[key] = response
        if self._cache_file is None:
            return
        try:
            with self._cache_file.open("a", encoding="utf-8") as file:
                # the newline is first: it ends a line that an interrupt has cut short
                file.write("\n" + json.dumps({"key": key, **asdict(response)}))
        except OSError as error:
            raise UserError(
                f"{self._cache_file}: {error.strerror or error}; choose another place for --output"
            ) from error


def _read_responses(cache_file: Path | None) -> dict[str, Response]:
    """Reads the responses of a file; skips lines that an interrupt has cut short, which are generated again."""
    responses: dict[str, Response] = {}
    if cache_file is None or not cache_file.is_file():
        return responses
    for line in cache_file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            key = record.pop("key")
            responses[key] = Response(**record)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return responses
