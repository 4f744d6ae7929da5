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
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from datamodules.errors import UserError
from lightning_modules.generation import Constraint, generate

if TYPE_CHECKING:
    from datamodules.tasks.prompts import Task
    from datamodules.tokenization import ChatFormat

Progress = Callable[[float], None]
MAX_NEW_TOKENS = {"risk": 256, "correlation": 512, "summary": 512, "triage": 1024, "remediation": 1024}


@dataclass(frozen=True)
class Reply:
    """What the model wrote to one question.

    Attributes:
        text: the answer.
        complete: whether the model ended it; False: it ran into the token limit.
        prompt_tokens_cut: tokens of the content that did not fit the model's context.
    """

    text: str
    complete: bool
    prompt_tokens_cut: int = 0


class Inquiry:
    """Asks one model.

    Args:
        model: as in :func:`lightning_modules.generation.generate`.
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

    def __call__(self, task: Task, contents: Sequence[str], progress: Progress = lambda share: None) -> list[Reply]:
        """Answers one question for each content, equal ones once.

        Args:
            task: what is asked.
            contents: the prompts' own parts.
            progress: called with the share of what had to be asked.
        """
        keys = [self._key(task, content) for content in contents]
        missing = {key: content for key, content in zip(keys, contents, strict=True) if key not in self._kept}
        self.reused += len(set(keys)) - len(missing)
        # the longest first, as generation sorts within a batch: little padding, and no flattering time left
        waiting = sorted(missing, key=lambda key: (-len(missing[key]), key))
        constraint = self._constraint(task) if waiting else None
        for start in range(0, len(waiting), self.batch_size):
            batch = waiting[start : start + self.batch_size]
            share = len(batch) / len(waiting)
            replies = self._ask(
                task, [missing[key] for key in batch], constraint,
                lambda done, start=start, share=share: progress(start / len(waiting) + share * done),  # type: ignore[misc]
            )  # fmt: skip
            self._keep(batch, replies)
        return [self._kept[key] for key in keys]

    def _ask(self, task: Task, contents: list[str], constraint: Constraint | None, progress: Progress) -> list[Reply]:
        limit = self.limits[task.name]
        chat = _Bounded(self.chat, self._positions() - limit)
        answers = generate(
            self.model,
            cast("ChatFormat", chat),
            task,
            contents,
            max_new_tokens=limit,
            batch_size=self.batch_size,
            progress=progress,
            constraint=constraint,
        )
        return [Reply(a.text, a.stopped, chat.cut[c]) for a, c in zip(answers, contents, strict=True)]

    def _positions(self) -> int:
        config: Any = self.model.config
        known = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
        return min((value for value in known if value), default=1 << 20)

    def _constraint(self, task: Task) -> Constraint | None:
        if not self.constrained:
            return None
        from lightning_modules.grammar import JsonGrammar

        return JsonGrammar(self.chat.tokenizer, self.chat.eos_id, task.answer_schema)

    def _key(self, task: Task, content: str) -> str:
        settings = [self.identity, task.name, task.system, task.instruction, task.answer_schema, self.constrained]
        text = json.dumps([*settings, self.limits[task.name], content])
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _keep(self, keys: Sequence[str], replies: Sequence[Reply]) -> None:
        fresh = dict(zip(keys, replies, strict=True))
        self._kept |= fresh
        if self._journal is None:
            return
        lines = (json.dumps({"key": key, **asdict(reply)}) for key, reply in fresh.items())
        try:
            with self._journal.open("a", encoding="utf-8") as file:
                file.write("\n" + "\n".join(lines))  # the newline comes first: a line that was cut short ends there
        except OSError as error:
            raise UserError(f"{self._journal}: {error.strerror or error}; choose another place for --output") from error


class _Bounded:
    """A chat format whose prompts are cut, in the middle of their content, to a number of tokens.

    Attributes:
        cut: content -> tokens of it that were cut.
    """

    def __init__(self, chat: ChatFormat, limit: int) -> None:
        self._chat, self._limit = chat, limit
        self.cut: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chat, name)

    def prompt_ids(self, task: Task, contents: Sequence[str]) -> list[list[int]]:
        """Ids of prompts of at most the limit; see ``ChatFormat.truncate_prompt``."""
        prompts = []
        for content, ids in zip(contents, self._chat.prompt_ids(task, contents), strict=True):
            self.cut[content] = 0
            if len(ids) > self._limit:
                ids, self.cut[content] = self._chat.truncate_prompt(task, content, self._limit)
            prompts.append(ids)
        return prompts


def _read_journal(journal: Path | None) -> dict[str, Reply]:
    """Reads what is there; a line that an interrupt cut short is left out and asked again."""
    kept: dict[str, Reply] = {}
    if journal is None or not journal.is_file():
        return kept
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            key = record.pop("key")
            kept[key] = Reply(**record)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return kept
