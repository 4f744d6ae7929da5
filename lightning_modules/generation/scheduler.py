"""Prompts that wait for a slot of the cache, answers on their way, and the steps between.

See :mod:`lightning_modules.generation.engine`, which asks, and :mod:`lightning_modules.generation.kv_cache`, which
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from lightning_modules.generation.kv_cache import SlotKVCache
from lightning_modules.generation.requests import ConstraintState, GenerationRequest

Progress = Callable[[float], None]  #: called with the share of the work done, 0..1, never falling
FILL_TOKENS = 1 << 14  #: tokens of prompts that go through the model at once: more gain no speed and cost memory


@dataclass
class RunningSequence:
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
    question: GenerationRequest
    prompt: list[int]
    tokens: list[int]
    logprob: float = 0.0
    ended: bool = False
    matcher: ConstraintState | None = field(init=False)
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


class Scheduler:
    """Prompts that wait, those in slots, and the steps between."""

    def __init__(
        self,
        slots: SlotKVCache,
        rows: Sequence[RunningSequence],
        eos_id: int,
        max_preamble_tokens: Callable[[list[int]], bool] | None,
    ) -> None:
        self.slots, self.eos_id, self.max_preamble_tokens = slots, eos_id, max_preamble_tokens
        # the longest first: if memory is short it shows at once, and neighbours need little padding
        self.waiting = sorted(rows, key=lambda row: (len(row.prompt), -row.index))
        self.rows: list[RunningSequence | None] = [None] * slots.slots
        # a prompt alone keeps a GPU idle, while a free slot costs a CPU a row's arithmetic
        self.patience = max(1, slots.slots // 8) if slots.device.type == "cuda" else 1

    def run(self, share: ProgressTracker) -> Iterator[RunningSequence]:
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

    def _step(self) -> Iterator[RunningSequence]:
        count = 1 + max(slot for slot, row in enumerate(self.rows) if row is not None)
        rows, start = self.rows[:count], len(self.slots.prefix.ids)
        ids = [row.newest if row is not None else 0 for row in rows]
        positions = [row.position if row is not None else start for row in rows]
        tokens, logprobs = self.slots.step(ids, positions, partial(_allowed, rows))
        for slot, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            if row is not None and self._advance(row, token, logprob):
                self.rows[slot] = None
                yield row

    def _advance(self, row: RunningSequence, token: int, logprob: float) -> bool:
        """Books a token; returns whether the answer is over."""
        row.logprob += logprob
        row.ended = token == self.eos_id
        if row.ended:
            return True
        row.tokens.append(token)
        if row.matcher is not None:
            row.matcher.accept(token)
        row.newest, row.position = token, row.position + 1
        return row.full or (self.max_preamble_tokens is not None and self.max_preamble_tokens(row.tokens))


def _allowed(rows: Sequence[RunningSequence | None]) -> Tensor | None:
    """A bit for each token that may come next; see :class:`LogitsConstraint`."""
    constraints = {id(row.question.constraint): row.question.constraint for row in rows if row is not None}
    bits = [
        constraint.allowed([row.matcher if row and row.question.constraint is constraint else None for row in rows])
        for constraint in constraints.values()
        if constraint is not None
    ]
    return reduce(torch.bitwise_and, bits) if bits else None


def _parts(taken: list[tuple[int, RunningSequence]], start: int) -> Iterator[list[tuple[int, RunningSequence]]]:
    """Parts of a few prompts each, the longest first, so that a part is no more than :data:`FILL_TOKENS`."""
    while taken:
        most = max(1, FILL_TOKENS // max(len(taken[0][1].prompt) - start, 1))
        yield taken[:most]
        taken = taken[most:]


class ProgressTracker:
    """Turns steps into the share of all work done, for a progress bar."""

    def __init__(self, answers: int, limit: int, progress: Progress | None) -> None:
        self.answers, self.limit, self.progress = answers, limit, progress
        self.finished, self.steps, self.share = 0, 0, 0.0

    def ended(self, rows: Sequence[RunningSequence]) -> None:
        """Counts answers that are over."""
        self.finished += len(rows)
        self.steps += sum(len(row.tokens) + row.ended for row in rows)

    def __call__(self, rows: Sequence[Any]) -> None:
        """Reports the share done, answers on their way included by their expected length."""
        if self.progress is None:
            return
        expected = max(self.steps / self.finished if self.finished else self.limit, 1)  # steps of an answer
        forced_prefix = sum(min(len(row.tokens) / expected, 0.99) for row in rows)
        self.share = max(self.share, min((self.finished + forced_prefix) / self.answers, 1.0))
        self.progress(self.share)
