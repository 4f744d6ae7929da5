"""Continuous-batching scheduler: assigns waiting prompts to free slots of the cache and runs the steps.

:mod:`lightning_modules.generation.engine` makes the sequences, and :mod:`lightning_modules.generation.kv_cache`
computes the steps.
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

Progress = Callable[[float], None]  #: called with the fraction of the work that is done, 0..1, never decreasing
FILL_TOKENS = 1 << 14  #: prompt tokens per forward pass: more tokens are not faster and take memory


@dataclass
class RunningSequence:
    """A prompt and its output so far.

    Attributes:
        index: index of the request.
        request: the request that is answered.
        prompt: all tokens that are known at the start, including the forced prefix of the output.
        tokens: the output so far.
        logprob: log-probability of the generated tokens.
        ended: True if the model has ended the output.
        matcher: state of the request's constraint, if it has one.
        newest: the newest token, the input of the next step.
        position: position of the newest token.
    """

    index: int
    request: GenerationRequest
    prompt: list[int]
    tokens: list[int]
    logprob: float = 0.0
    ended: bool = False
    matcher: ConstraintState | None = field(init=False)
    newest: int = field(init=False)
    position: int = field(init=False)

    def __post_init__(self) -> None:
        self.newest, self.position = self.prompt[-1], len(self.prompt) - 1
        constraint = self.request.constraint
        self.matcher = constraint.start() if constraint is not None else None
        for token in self.tokens if self.matcher is not None else ():
            self.matcher.accept(token)  # type: ignore[union-attr]

    @property
    def full(self) -> bool:
        """True if the output has as many tokens as the request allows."""
        return len(self.tokens) >= self.request.max_new_tokens


class Scheduler:
    """Runs sequences in the slots of a cache until all have ended.

    Args:
        cache: the slots.
        sequences: the sequences to run, in any order.
        eos_id: id of the token that ends an output.
        should_stop: called after every step with the tokens of an output; True ends it as the token limit does.
    """

    def __init__(
        self,
        cache: SlotKVCache,
        sequences: Sequence[RunningSequence],
        eos_id: int,
        should_stop: Callable[[list[int]], bool] | None,
    ) -> None:
        self.cache, self.eos_id, self.should_stop = cache, eos_id, should_stop
        # the longest first: a lack of memory shows at once, and prompts filled together need little padding
        self.waiting = sorted(sequences, key=lambda sequence: (len(sequence.prompt), -sequence.index))
        self.running: list[RunningSequence | None] = [None] * cache.num_slots
        # a single prompt does not fill a GPU; on a CPU every free slot costs the arithmetic of a row
        self.min_free_slots = max(1, cache.num_slots // 8) if cache.device.type == "cuda" else 1

    def run(self, tracker: ProgressTracker) -> Iterator[RunningSequence]:
        """Yields sequences as they end."""
        full = [sequence for sequence in self.waiting if sequence.full]
        self.waiting = [sequence for sequence in self.waiting if not sequence.full]
        yield from full
        tracker.add_finished(full)
        while self.waiting or any(self.running):
            self._fill_slots()
            ended = list(self._step())
            yield from ended
            tracker.add_finished(ended)
            tracker.report([sequence for sequence in self.running if sequence is not None])

    def _fill_slots(self) -> None:
        """Assigns waiting prompts to free slots; if none is waiting, moves the last sequences into the free slots."""
        free = [slot for slot, sequence in enumerate(self.running) if sequence is None]
        if self.waiting and (len(free) >= self.min_free_slots or len(free) == len(self.running)):
            assigned = [(slot, self.waiting.pop()) for slot in free[: len(self.waiting)]]
            for slot, sequence in assigned:
                self.running[slot] = sequence
            start = len(self.cache.prefix.ids)
            for batch in _fill_batches(assigned, start):
                self.cache.fill([slot for slot, _ in batch], [sequence.prompt[start:-1] for _, sequence in batch])
        elif not self.waiting:
            for slot in free:
                last = max((index for index, sequence in enumerate(self.running) if sequence is not None), default=-1)
                if last > slot:
                    self.cache.move(last, slot)
                    self.running[slot], self.running[last] = self.running[last], None

    def _step(self) -> Iterator[RunningSequence]:
        """Generates one token for every running sequence; yields those that end with it."""
        count = 1 + max(slot for slot, sequence in enumerate(self.running) if sequence is not None)
        rows, start = self.running[:count], len(self.cache.prefix.ids)
        ids = [row.newest if row is not None else 0 for row in rows]
        positions = [row.position if row is not None else start for row in rows]
        tokens, logprobs = self.cache.step(ids, positions, partial(_allowed, rows))
        for slot, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            if row is not None and self._append(row, token, logprob):
                self.running[slot] = None
                yield row

    def _append(self, sequence: RunningSequence, token: int, logprob: float) -> bool:
        """Appends a generated token; returns True if the output has ended or is cut."""
        sequence.logprob += logprob
        sequence.ended = token == self.eos_id
        if sequence.ended:
            return True
        sequence.tokens.append(token)
        if sequence.matcher is not None:
            sequence.matcher.accept(token)
        sequence.newest, sequence.position = token, sequence.position + 1
        return sequence.full or (self.should_stop is not None and self.should_stop(sequence.tokens))


def _allowed(rows: Sequence[RunningSequence | None]) -> Tensor | None:
    """Returns one bit per token that may come next in each row, None if no row has a constraint."""
    constraints = {id(row.request.constraint): row.request.constraint for row in rows if row is not None}
    bits = [
        constraint.allowed([row.matcher if row and row.request.constraint is constraint else None for row in rows])
        for constraint in constraints.values()
        if constraint is not None
    ]
    return reduce(torch.bitwise_and, bits) if bits else None


def _fill_batches(
    assigned: list[tuple[int, RunningSequence]], start: int
) -> Iterator[list[tuple[int, RunningSequence]]]:
    """Yields batches of prompts, the longest first, each of at most :data:`FILL_TOKENS` tokens or one prompt."""
    while assigned:
        size = max(1, FILL_TOKENS // max(len(assigned[0][1].prompt) - start, 1))
        yield assigned[:size]
        assigned = assigned[size:]


class ProgressTracker:
    """Converts steps into the fraction of all work that is done, for a progress bar.

    Args:
        num_outputs: number of outputs to generate.
        token_limit: largest number of tokens per output.
        progress: called with the fraction; None reports nothing.
    """

    def __init__(self, num_outputs: int, token_limit: int, progress: Progress | None) -> None:
        self.num_outputs, self.token_limit, self.progress = num_outputs, token_limit, progress
        self.finished, self.steps, self.fraction = 0, 0, 0.0

    def add_finished(self, sequences: Sequence[RunningSequence]) -> None:
        """Counts sequences that have ended."""
        self.finished += len(sequences)
        self.steps += sum(len(sequence.tokens) + sequence.ended for sequence in sequences)

    def report(self, running: Sequence[Any]) -> None:
        """Reports the fraction done; a running sequence counts by its tokens over the mean length so far."""
        if self.progress is None:
            return
        expected = max(self.steps / self.finished if self.finished else self.token_limit, 1)  # steps per output
        partial_outputs = sum(min(len(sequence.tokens) / expected, 0.99) for sequence in running)
        self.fraction = max(self.fraction, min((self.finished + partial_outputs) / self.num_outputs, 1.0))
        self.progress(self.fraction)
