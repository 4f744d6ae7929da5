"""Greedy generation in slots behind one cached prompt prefix, free or held to a grammar.

Every prompt of a task begins with the same tokens (system text and instruction, about 120 of 280). They go through
the model once, alone; their keys and values lie before each slot of the cache (:mod:`lightning_modules.slots`). A
slot whose answer has ended takes the next prompt, so that no row waits for the longest of a batch. Meanwhile adapters
and 4-bit layers are one 16-bit copy, where the memory is there (:mod:`lightning_modules.merged`).

The tokens are those of ``model.generate`` called on one prompt at a time. A prompt that leaves no room for its answer
is cut in the middle by rule and says so; an answer that reaches the token limit says so too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lightning_modules.merged import free_memory, merged
from lightning_modules.prefix_cache import Prefix, bounded_prompts, common_prefix, evaluating, known_positions
from lightning_modules.slots import Slots, grouped_attention

if TYPE_CHECKING:
    from datamodules.tasks.prompts import Task
    from datamodules.tokenization import ChatFormat

Progress = Callable[[float], None]  #: called with the share of the work done, 0..1, never falling
FILL_TOKENS = 1 << 14  #: tokens of prompts that go through the model at once: more gain no speed and cost memory
CACHE_SHARE = 0.7  #: of the free memory that keys and values may take


class Matcher(Protocol):
    """Follows one answer."""

    def accept(self, token: int) -> None:
        """Takes the answer's newest token."""


class Constraint(Protocol):
    """Says which tokens may come next, for many answers at once."""

    def start(self) -> Matcher:
        """Makes the matcher of one answer."""

    def allowed(self, matchers: Sequence[Any]) -> Tensor:
        """Returns int32 [B, W] on the CPU: a bit for each token that may come; all bits where there is no matcher."""

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of an answer's first tokens the grammar has."""


@dataclass(frozen=True)
class Question:
    """What one answer is asked for.

    Attributes:
        task: whose prompt is used.
        content: the part of the prompt that differs (a finding as JSON, say).
        max_new_tokens: limit of the answer.
        constraint: restricts the answer's tokens, for instance to a grammar.
        begun: tokens that the answer begins with; the model goes on from there. Their probability is not in
            ``logprob``.
    """

    task: Task
    content: str
    max_new_tokens: int = 256
    constraint: Constraint | None = None
    begun: Sequence[int] = ()


@dataclass(frozen=True)
class Answer:
    """What the model wrote after one prompt.

    Attributes:
        text: the answer without control tokens.
        stopped: whether the model ended it; False: it ran into the token limit (or ``give_up``) and is cut.
        token_ids: as generated, the end-of-sequence token left out.
        logprob: natural logarithm of the answer's probability, its end-of-sequence token included.
        prompt_tokens_cut: tokens of the content that did not fit the model's positions.
    """

    text: str
    stopped: bool
    token_ids: list[int]
    logprob: float
    prompt_tokens_cut: int = 0


def generate(
    model: nn.Module,
    chat: ChatFormat,
    task: Task,
    contents: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    progress: Progress | None = None,
    constraint: Constraint | None = None,
    begun: Sequence[Sequence[int]] | None = None,
    give_up: Callable[[list[int]], bool] | None = None,
    on_answer: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Writes one answer for each content, greedily.

    Args:
        model: a Hugging Face causal language model, with or without PEFT adapters, on any device. It is put in
            evaluation mode meanwhile.
        chat: turns contents into prompt ids and ids into text.
        task: whose prompt is used.
        contents: the part of the prompt that differs (a finding as JSON, say).
        max_new_tokens: limit of an answer.
        batch_size: slots; fewer where the cache would not fit the device's memory.
        progress: called after every step.
        constraint: restricts the tokens of each answer, for instance to a grammar.
        begun: for each content the tokens that its answer begins with; the model goes on from there. Their probability
            is not in ``logprob``.
        give_up: asked after every step with an answer's tokens; true ends it as the token limit would.
        on_answer: called with index and answer as answers end.

    Returns:
        One answer per content, in the order of the contents.

    Raises:
        UserError: a prompt leaves no room for an answer within the positions that the model knows.
    """
    tokens = begun if begun is not None else [()] * len(contents)
    questions = [
        Question(task, content, max_new_tokens, constraint, ids) for content, ids in zip(contents, tokens, strict=True)
    ]
    return answer_questions(
        model, chat, questions, batch_size=batch_size, progress=progress, give_up=give_up, on_answer=on_answer
    )


def answer_questions(
    model: nn.Module,
    chat: ChatFormat,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    give_up: Callable[[list[int]], bool] | None = None,
    on_answer: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Answers questions of any tasks together, greedily.

    Args:
        model: see :func:`generate`, as all others.
        chat: turns contents into prompt ids and ids into text.
        questions: those of one task share more of their prompts.
        batch_size: slots; fewer where the cache would not fit the device's memory.
        progress: called after every step.
        give_up: asked after every step with an answer's tokens; true ends it as the token limit would.
        on_answer: called with index and answer as answers end.

    Returns:
        One answer per question, in their order.

    Raises:
        UserError: a prompt leaves no room for an answer within the positions that the model knows.
    """
    if not questions:
        return []
    prompts, cuts = _prompts(chat, questions, known_positions(model.config))
    answers: list[Answer | None] = [None] * len(prompts)
    share = _Share(len(prompts), max(question.max_new_tokens for question in questions), progress)
    with ExitStack() as stack:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        for context in (evaluating(model), torch.no_grad(), grouped_attention(base), merged(model)):
            stack.enter_context(context)
        prefix = Prefix(model, common_prefix(chat.prefix_ids(questions[0].task), prompts))
        rows = [
            _Row(index, question, [*prompt, *question.begun], list(question.begun))
            for index, (prompt, question) in enumerate(zip(prompts, questions, strict=True))
        ]
        length = max(len(row.prompt) - len(row.tokens) + row.question.max_new_tokens for row in rows)
        slots = Slots(prefix, _slots(prefix, min(batch_size, len(rows)), length), length)
        for row in _Queue(slots, rows, chat.eos_id, give_up).run(share):
            written = Answer(
                chat.decode(row.tokens, row.question.task), row.ended, row.tokens, row.logprob, cuts[row.index]
            )
            answers[row.index] = written
            if on_answer is not None:
                on_answer(row.index, written)
    return [written for written in answers if written is not None]


def _prompts(chat: ChatFormat, questions: Sequence[Question], positions: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of all questions, and the tokens that were cut from each; a task's are made at once."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault((id(question.task), question.max_new_tokens), []).append(index)
    prompts: list[list[int]] = [[]] * len(questions)
    cuts = [0] * len(questions)
    for (_, room), indices in groups.items():
        contents = [questions[index].content for index in indices]
        found = bounded_prompts(chat, questions[indices[0]].task, contents, positions - room)
        for index, prompt, cut in zip(indices, *found, strict=True):
            prompts[index], cuts[index] = prompt, cut
    return prompts, cuts


def constrained(
    free: Sequence[Answer],
    constraint: Constraint,
    eos_id: int,
    write: Callable[[list[int], list[list[int]]], list[Answer]],
) -> list[Answer]:
    """The answers that greedy generation gives under a constraint, from those that it gave freely.

    As long as every token of a free answer is allowed, the constrained one is the same: only an answer that leaves the
    grammar is written anew, from the token where it does. One that was cut goes on from there, if ``write`` has room.

    Args:
        free: answers without constraint.
        constraint: of the constrained ones.
        eos_id: the token that ended those which stopped.
        write: generates under the constraint, given indices of answers and the tokens that each begins with.
    """
    answers, anew = list(free), dict[int, list[int]]()
    for index, answer in enumerate(free):
        whole = [*answer.token_ids, *[eos_id] * answer.stopped]
        accepted = constraint.accepts(whole)
        if accepted < len(whole) or not answer.stopped:
            anew[index] = whole[:accepted]
    for index, answer in zip(anew, write(list(anew), list(anew.values())) if anew else [], strict=True):
        answers[index] = answer
    return answers


def _slots(prefix: Prefix, wanted: int, length: int) -> int:
    room = CACHE_SHARE * free_memory(prefix.device) / (prefix.bytes_per_position * length)
    return max(1, min(wanted, int(room)))


@dataclass
class _Row:
    """An answer on its way.

    Attributes:
        index: of the question.
        question: that is answered.
        prompt: all tokens that are known at the start, of the answer too.
        tokens: of the answer so far.
        logprob: of the tokens that were generated.
        ended: whether the model ended it.
        matcher: follows it, where there is a constraint.
    """

    index: int
    question: Question
    prompt: list[int]
    tokens: list[int]
    logprob: float = 0.0
    ended: bool = False
    matcher: Matcher | None = field(init=False)
    newest: int = field(init=False)
    position: int = field(init=False)

    def __post_init__(self) -> None:
        self.newest, self.position = self.prompt[-1], len(self.prompt) - 1
        constraint = self.question.constraint
        self.matcher = constraint.start() if constraint is not None else None
        for token in self.tokens if self.matcher is not None else ():
            self.matcher.accept(token)  # type: ignore[union-attr]

    @property
    def full(self) -> bool:
        """Whether the answer has all tokens that it may have."""
        return len(self.tokens) >= self.question.max_new_tokens


class _Queue:
    """Prompts that wait, those in slots, and the steps between."""

    def __init__(
        self, slots: Slots, rows: Sequence[_Row], eos_id: int, give_up: Callable[[list[int]], bool] | None
    ) -> None:
        self.slots, self.eos_id, self.give_up = slots, eos_id, give_up
        # the longest first: if memory is short it shows at once, and neighbours need little padding
        self.waiting = sorted(rows, key=lambda row: (len(row.prompt), -row.index))
        self.rows: list[_Row | None] = [None] * slots.slots
        # a prompt alone keeps a GPU idle, while a free slot costs a CPU a row's arithmetic
        self.patience = max(1, slots.slots // 8) if slots.device.type == "cuda" else 1

    def run(self, share: _Share) -> Iterator[_Row]:
        """Yields rows as they end."""
        done = [row for row in self.waiting if row.full]
        self.waiting = [row for row in self.waiting if not row.full]
        yield from done
        share.ended(done)
        while self.waiting or any(self.rows):
            self._fill()
            ended = list(self._step())
            yield from ended
            share.ended(ended)
            share([row for row in self.rows if row is not None])

    def _fill(self) -> None:
        """Puts waiting prompts into free slots; where none waits, moves the last rows into them."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        if self.waiting and (len(free) >= self.patience or len(free) == len(self.rows)):
            taken = [(slot, self.waiting.pop()) for slot in free[: len(self.waiting)]]
            for slot, row in taken:
                self.rows[slot] = row
            start = len(self.slots.prefix.ids)
            for part in _parts(taken, start):
                self.slots.fill([slot for slot, _ in part], [row.prompt[start:-1] for _, row in part])
        elif not self.waiting:
            for hole in free:
                last = max((slot for slot, row in enumerate(self.rows) if row is not None), default=-1)
                if last > hole:
                    self.slots.move(last, hole)
                    self.rows[hole], self.rows[last] = self.rows[last], None

    def _step(self) -> Iterator[_Row]:
        count = 1 + max(slot for slot, row in enumerate(self.rows) if row is not None)
        rows, start = self.rows[:count], len(self.slots.prefix.ids)
        ids = [row.newest if row is not None else 0 for row in rows]
        positions = [row.position if row is not None else start for row in rows]
        tokens, logprobs = self.slots.step(ids, positions, partial(_allowed, rows))
        for slot, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            if row is not None and self._advance(row, token, logprob):
                self.rows[slot] = None
                yield row

    def _advance(self, row: _Row, token: int, logprob: float) -> bool:
        """Books a token; returns whether the answer is over."""
        row.logprob += logprob
        row.ended = token == self.eos_id
        if row.ended:
            return True
        row.tokens.append(token)
        if row.matcher is not None:
            row.matcher.accept(token)
        row.newest, row.position = token, row.position + 1
        return row.full or (self.give_up is not None and self.give_up(row.tokens))


def _allowed(rows: Sequence[_Row | None]) -> Tensor | None:
    """A bit for each token that may come next; see :class:`Constraint`."""
    constraints = {id(row.question.constraint): row.question.constraint for row in rows if row is not None}
    bits = [
        constraint.allowed([row.matcher if row and row.question.constraint is constraint else None for row in rows])
        for constraint in constraints.values()
        if constraint is not None
    ]
    return reduce(torch.bitwise_and, bits) if bits else None


def _parts(taken: list[tuple[int, _Row]], start: int) -> Iterator[list[tuple[int, _Row]]]:
    """Parts of a few prompts each, the longest first, so that a part is no more than :data:`FILL_TOKENS`."""
    while taken:
        most = max(1, FILL_TOKENS // max(len(taken[0][1].prompt) - start, 1))
        yield taken[:most]
        taken = taken[most:]


class _Share:
    """Turns steps into the share of all work done, for a progress bar."""

    def __init__(self, answers: int, limit: int, progress: Progress | None) -> None:
        self.answers, self.limit, self.progress = answers, limit, progress
        self.finished, self.steps, self.share = 0, 0, 0.0

    def ended(self, rows: Sequence[_Row]) -> None:
        """Counts answers that are over."""
        self.finished += len(rows)
        self.steps += sum(len(row.tokens) + row.ended for row in rows)

    def __call__(self, rows: Sequence[Any]) -> None:
        if self.progress is None:
            return
        expected = max(self.steps / self.finished if self.finished else self.limit, 1)  # steps of an answer
        begun = sum(min(len(row.tokens) / expected, 0.99) for row in rows)
        self.share = max(self.share, min((self.finished + begun) / self.answers, 1.0))
        self.progress(self.share)
