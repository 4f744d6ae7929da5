"""Greedy generation in batches behind one cached prompt prefix; likelihoods of given answers by the same means.

Shapes in names: B rows, P prefix tokens, S tokens of the rest of a prompt, L tokens in the cache, V vocabulary,
C choices.

Every prompt of a task begins with the same tokens (system text and instruction, about 120 of 280). They go through
the model once, alone; their keys and values are copied before each row of every batch::

    cache   | prefix (copied) | padding, rest of the prompt | generated ... |
    mask    | 1 1 1 1 1 1 1 1 | 0 0 1 1 1 1 1 1 1 1 1 1 1 1 | 1 1 1          |
    position  0 ............P-1     P ..................P+s-1  P+s ...

Masks and positions are given explicitly, so that padding between prefix and prompt changes nothing. Prompts are sorted
by length (rows of a batch need little padding), rows that end leave the batch, and only the last position goes
through the output layer. The tokens are those of ``model.generate`` called on one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.prefix_cache import Prefix, batches_by_length, common_prefix, evaluating

if TYPE_CHECKING:
    from datamodules.tasks.prompts import Pair, Task
    from datamodules.tokenization import ChatFormat

Progress = Callable[[float], None]  #: called with the share of the work done, 0..1, never falling


class Matcher(Protocol):
    """Follows one answer and says which tokens may come next."""

    def __call__(self, token: int | None) -> Tensor:
        """Takes the answer's newest token (None before the first) and returns bool [V] on the CPU, True = allowed."""


Constraint = Callable[[], Matcher]  #: makes the matcher of one answer


@dataclass(frozen=True)
class Answer:
    """What the model wrote after one prompt.

    Attributes:
        text: the answer without control tokens.
        stopped: whether the model ended it; False: it ran into the token limit and is cut.
        token_ids: as generated, the end-of-sequence token left out.
        logprob: natural logarithm of the answer's probability, its end-of-sequence token included.
    """

    text: str
    stopped: bool
    token_ids: list[int]
    logprob: float


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
) -> list[Answer]:
    """Writes one answer for each content, greedily.

    Args:
        model: a Hugging Face causal language model, with or without PEFT adapters, on any device. It is put in
            evaluation mode meanwhile.
        chat: turns contents into prompt ids and ids into text.
        task: whose prompt is used.
        contents: the part of the prompt that differs (a finding as JSON, say).
        max_new_tokens: limit of an answer.
        batch_size: rows at once.
        progress: called after every step.
        constraint: restricts the tokens of each answer, for instance to a grammar.

    Returns:
        One answer per content, in the order of the contents.

    Raises:
        UserError: a prompt leaves no room for an answer within the positions that the model knows.
    """
    if not contents:
        return []
    prompts = [list(ids) for ids in chat.prompt_ids(task, contents)]
    answers: list[Answer | None] = [None] * len(prompts)
    report = _Share(len(prompts), max_new_tokens, progress)
    with evaluating(model), torch.no_grad():
        prefix = Prefix(model, common_prefix(chat.prefix_ids(task), prompts))
        for batch in batches_by_length([len(prompt) for prompt in prompts], batch_size):
            decoder = _Decoder(prefix, [prompts[i] for i in batch], chat.eos_id, max_new_tokens, constraint)
            for row, tokens, stopped, logprob in decoder.run(report):
                text = chat.decode(tokens)
                answers[batch[row]] = Answer(text=text, stopped=stopped, token_ids=tokens, logprob=logprob)
    return [answer for answer in answers if answer is not None]


def completion_nll(
    model: nn.Module,
    chat: ChatFormat,
    task: Task,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each pair's completion, its end-of-sequence token included.

    Returns:
        float64 [n] sums over the completion's tokens (natural logarithm) and int64 [n] token counts, on the CPU: the
        held-out loss is ``nll.sum() / tokens.sum()``.
    """
    examples = chat.encode(task, pairs)
    prompts = [example.prompt_ids.tolist() for example in examples]
    completions = [example.completion_ids.tolist() for example in examples]
    nll_n, tokens_n = torch.zeros(len(examples), dtype=torch.float64), torch.tensor([len(ids) for ids in completions])
    done = 0
    with evaluating(model), torch.no_grad():
        prefix = Prefix(model, common_prefix(chat.prefix_ids(task), prompts))
        for batch in batches_by_length(
            [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], batch_size
        ):
            rows = [prompts[i] + completions[i] for i in batch]
            logprob_BC = _row_logprobs(prefix, rows, [len(completions[i]) for i in batch])
            nll_n[batch] = -logprob_BC.sum(1).cpu().double()
            done += len(batch)
            if progress is not None:
                progress(done / len(examples))
    return nll_n, tokens_n


def forced_choice(
    model: nn.Module,
    chat: ChatFormat,
    task: Task,
    contents: Sequence[str],
    stem: str,
    choices: Sequence[str],
    *,
    batch_size: int = 16,
) -> Tensor:
    """Log-likelihood of each choice as the answer's continuation after ``stem``; nothing is generated.

    The choice with the highest value is what the model would say if it had to pick: a cheap measure while training
    that also works on a model that cannot write JSON yet. Choices are compared whole, by the sum over their tokens.

    Args:
        model: as in :func:`generate`.
        chat: as in :func:`generate`.
        task: as in :func:`generate`.
        contents: as in :func:`generate`.
        stem: how the answer begins, for instance ``{"severity":"``.
        choices: the texts to compare, none of them the beginning of another.
        batch_size: contents at once.

    Returns:
        float32 [n, choices] on the CPU.
    """
    from datamodules.tasks.prompts import Pair

    fillers = [
        Pair(task=task.name, content="", completion=stem + choice, severity="", category="", findings=1)
        for choice in choices
    ]
    tails = [example.completion_ids.tolist()[:-1] for example in chat.encode(task, fillers)]  # without end of sequence
    shared = len(common_prefix(min(tails, key=len), tails))  # the stem's tokens: the same for every choice
    stem_ids, ends = tails[0][:shared], [tail[shared:] for tail in tails]
    rows = [list(ids) + stem_ids for ids in chat.prompt_ids(task, contents)]
    result_NC = torch.zeros(len(rows), len(choices), dtype=torch.float32)
    with evaluating(model), torch.no_grad():
        prefix = Prefix(model, common_prefix(chat.prefix_ids(task), rows))
        for batch in batches_by_length([len(row) for row in rows], batch_size):
            result_NC[batch] = _choice_logprobs(prefix, [rows[i] for i in batch], ends).cpu()
    return result_NC


class _Decoder:
    """One batch on its way from prompts to answers."""

    def __init__(
        self,
        prefix: Prefix,
        prompts: list[list[int]],
        eos_id: int,
        max_new_tokens: int,
        constraint: Constraint | None,
    ) -> None:
        self.prefix, self.eos_id, self.limit = prefix, eos_id, max_new_tokens
        self.ids, self.mask, self.positions, self.cache = prefix.rest(prompts, max_new_tokens)
        self.rows = list(range(len(prompts)))  # the prompt of each row still in the batch
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logprobs = [0.0] * len(prompts)
        self.matchers = [constraint() for _ in prompts] if constraint is not None else None

    def run(self, report: _Share) -> Iterator[tuple[int, list[int], bool, float]]:
        """Yields (index of the prompt, tokens, stopped, log-probability) as answers end."""
        for step in range(1, self.limit + 1):
            tokens_B = self._step()
            ended = [row for row, token in zip(self.rows, tokens_B.tolist(), strict=True) if token == self.eos_id]
            for row in self.rows if step == self.limit else ended:
                yield row, self.tokens[row], row in ended, self.logprobs[row]
            report(step, len(self.rows), ended=len(self.rows) if step == self.limit else len(ended))
            if len(ended) == len(self.rows) or step == self.limit:
                return
            self._advance(tokens_B, set(ended))

    def _step(self) -> Tensor:
        """Picks each row's next token and books it."""
        logits_BV = self.prefix.logits(self.ids, self.mask, self.positions, self.cache)[:, 0]
        if self.matchers is not None:
            allowed = [self.matchers[row](self.tokens[row][-1] if self.tokens[row] else None) for row in self.rows]
            logits_BV = logits_BV.masked_fill(~_widened(torch.stack(allowed), logits_BV), float("-inf"))
        logprob_B, tokens_B = logits_BV.log_softmax(-1).max(-1)
        for row, token, logprob in zip(self.rows, tokens_B.tolist(), logprob_B.tolist(), strict=True):
            self.logprobs[row] += logprob
            if token != self.eos_id:
                self.tokens[row].append(token)
        return tokens_B

    def _advance(self, tokens_B: Tensor, ended: set[int]) -> None:
        """Makes the chosen tokens the next input and drops the rows that ended."""
        self.ids, self.positions = tokens_B[:, None], self.positions[:, -1:] + 1
        self.mask = F.pad(self.mask, (0, 1), value=1)
        if not ended:
            return
        kept = torch.tensor([i for i, row in enumerate(self.rows) if row not in ended], device=tokens_B.device)
        self.rows = [row for row in self.rows if row not in ended]
        self.ids, self.positions, self.mask = self.ids[kept], self.positions[kept], self.mask[kept]
        self.cache.batch_select_indices(kept)


class _Share:
    """Turns steps into the share of all work done, for a progress bar."""

    def __init__(self, answers: int, limit: int, progress: Progress | None) -> None:
        self.answers, self.limit, self.progress = answers, limit, progress
        self.finished, self.steps, self.share = 0, 0, 0.0

    def __call__(self, step: int, rows: int, ended: int) -> None:
        self.finished, self.steps = self.finished + ended, self.steps + step * ended
        if self.progress is None:
            return
        expected = self.steps / self.finished if self.finished else self.limit  # steps of an answer
        share = (self.finished + (rows - ended) * min(step / expected, 0.99)) / self.answers
        self.share = max(self.share, share)
        self.progress(self.share)


def _row_logprobs(prefix: Prefix, rows: list[list[int]], scored: list[int]) -> Tensor:
    """Log-probabilities of each row's last ``scored`` tokens, float32 [B, max(scored)], zero before them."""
    keep = max(scored)
    ids_BS, mask_BL, position_BS, cache = prefix.rest(rows, room=0)
    # The last token predicts nothing; the one before the first scored token does.
    logits_BKV = prefix.logits(ids_BS, mask_BL, position_BS, cache, keep=keep + 1)[:, :-1]
    targets_BK = ids_BS[:, -keep:]
    logprob_BK = torch.stack(
        [  # row by row: a second copy of all logits would cost hundreds of megabytes
            logits_KV.log_softmax(-1).gather(1, target_K[:, None])[:, 0]
            for logits_KV, target_K in zip(logits_BKV, targets_BK, strict=True)
        ]
    )
    counted_BK = torch.arange(keep, 0, -1, device=ids_BS.device) <= torch.tensor(scored, device=ids_BS.device)[:, None]
    return logprob_BK.masked_fill(~counted_BK, 0.0)


def _choice_logprobs(prefix: Prefix, rows: list[list[int]], ends: list[list[int]]) -> Tensor:
    """Log-probability of each end after each row, float32 [B, C]; a row is computed once for all its ends."""
    longest = max(map(len, ends))
    ids_BS, mask_BL, position_BS, cache = prefix.rest(rows, room=longest)
    logprob_BV = prefix.logits(ids_BS, mask_BL, position_BS, cache)[:, 0].log_softmax(-1)
    ends_CE = torch.tensor([end + [0] * (longest - len(end)) for end in ends], device=ids_BS.device)
    total_BC = logprob_BV[:, ends_CE[:, 0]]
    if longest == 1:
        return total_BC
    rows_B, choices_C = len(rows), len(ends)
    cache.batch_select_indices(torch.arange(rows_B, device=ids_BS.device).repeat_interleave(choices_C))
    mask = F.pad(mask_BL.repeat_interleave(choices_C, 0), (0, longest - 1), value=1)  # padding comes last: harmless
    steps = torch.arange(1, longest, device=ids_BS.device)
    positions = position_BS[:, -1:].repeat_interleave(choices_C, 0) + steps
    logits = prefix.logits(ends_CE[:, :-1].repeat(rows_B, 1), mask, positions, cache, keep=longest - 1)
    logprob = logits.log_softmax(-1).gather(2, ends_CE[:, 1:].repeat(rows_B, 1)[:, :, None])[:, :, 0]
    counted_CE = steps < torch.tensor([len(end) for end in ends], device=ids_BS.device)[:, None]
    return total_BC + (logprob.view(rows_B, choices_C, -1) * counted_CE).sum(2)


def _widened(allowed_BV: Tensor, logits_BV: Tensor) -> Tensor:
    """Moves a mask to the logits' device; ids beyond the tokenizer (padding of the embedding) are not allowed."""
    missing = logits_BV.shape[1] - allowed_BV.shape[1]
    return F.pad(allowed_BV.to(logits_BV.device), (0, missing), value=False)
