"""A model's worth on held-out pairs: what it writes freely, and how likely it finds the true answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from datamodules.records import SEVERITIES
from lightning_modules.answers import judge, parse
from lightning_modules.generation import generate
from lightning_modules.intervals import bootstrap, intervals, wilson
from lightning_modules.likelihood import completion_nll, forced_choice
from lightning_modules.metrics import AnswerMetrics

if TYPE_CHECKING:
    from datamodules.tasks.prompts import Pair, Task
    from datamodules.tokenization import ChatFormat

SEVERITY = '"severity":"'  #: what comes before an answer's severity


@dataclass(frozen=True)
class Outcome:
    """What came of one pair.

    Attributes:
        text: the answer.
        complete: whether the model ended it; False: it ran into the token limit.
        nll: negative log-likelihood of the expected answer, NaN where there is no model (a baseline).
        tokens: tokens of the expected answer.
        forced: the severity that is most likely behind the expected answer's beginning (its tags, say), "" where that
            was not asked.
    """

    text: str
    complete: bool = True
    nll: float = math.nan
    tokens: int = 0
    forced: str = ""


@dataclass(frozen=True)
class Scores:
    """The figures of one model or baseline on a sample.

    Attributes:
        figures: name -> value, NaN where nothing could be measured; ``loss`` is the held-out loss per token.
        intervals: name -> bounds of the 95 % interval, for the figures of the table.
        confusion: rows expected, columns answered severities, last column none; None where the task has none.
        outcomes: one for each pair.
    """

    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    confusion: list[list[int]] | None
    outcomes: list[Outcome]


def answer_pairs(
    model: nn.Module,
    chat: ChatFormat,
    task: Task,
    pairs: Sequence[Pair],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 25,
    forced: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Outcome]:
    """Lets a model answer pairs freely and scores their expected answers.

    Args:
        model: as in :func:`lightning_modules.generation.generate`.
        chat: of the model's tokenizer.
        task: of the pairs.
        pairs: whose answers are expected.
        max_new_tokens: limit of an answer; None is :func:`token_limit` of these pairs.
        batch_size: rows at once.
        forced: whether to ask also for the most likely severity without generation.
        progress: called with the share of the work done.
    """
    if not pairs:
        return []
    contents = [pair.content for pair in pairs]
    limit = max_new_tokens or token_limit(chat, task, pairs)
    share = 0.2  # of the time, for the likelihoods: a pass over all tokens costs about as much as 40 steps of a batch
    nll, tokens = completion_nll(
        model, chat, task, pairs, batch_size=batch_size, progress=lambda done: progress(share * done)
    )
    choices = [""] * len(pairs)
    if forced:
        asked = [index for index, pair in enumerate(pairs) if SEVERITY in pair.completion]
        stems = ["".join(pairs[index].completion.partition(SEVERITY)[:2]) for index in asked]
        likelihoods = forced_choice(
            model, chat, task, [contents[i] for i in asked], stems, SEVERITIES, batch_size=batch_size
        )
        for index, choice in zip(asked, likelihoods.argmax(1).tolist(), strict=True):
            choices[index] = SEVERITIES[choice]
    answers = generate(
        model, chat, task, contents, max_new_tokens=limit, batch_size=batch_size,
        progress=lambda done: progress(share + (1 - share) * done),
    )  # fmt: skip
    return [
        Outcome(answer.text, answer.stopped, loss, count, choice)
        for answer, loss, count, choice in zip(answers, nll.tolist(), tokens.tolist(), choices, strict=True)
    ]


def token_limit(chat: ChatFormat, task: Task, pairs: Sequence[Pair]) -> int:
    """Room for one and a half times the longest expected answer: a longer one is on no way to be right."""
    longest = max(len(example.completion_ids) for example in chat.encode(task, pairs))
    return longest * 3 // 2 + 16


def score(task: Task, pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> Scores:
    """Turns outcomes into figures; no communication between ranks: all outcomes are here."""
    judged = [judge(task, pair, item.text, item.complete) for pair, item in zip(pairs, outcomes, strict=True)]
    metrics = AnswerMetrics(task, sync_on_compute=False)
    metrics.update(judged)
    figures, bounds = metrics.results(), intervals(judged)
    nll_N, tokens_N = np.array([item.nll for item in outcomes]), np.array([item.tokens for item in outcomes])
    if len(nll_N) and not np.isnan(nll_N).any():
        figures["loss"] = float(nll_N.sum() / tokens_N.sum())
        bounds["loss"] = bootstrap(lambda index: nll_N[index].sum(1) / tokens_N[index].sum(1), len(nll_N))
    if any(item.forced for item in outcomes):
        right = sum(item.forced == judged[i].expected.get("severity") for i, item in enumerate(outcomes))
        figures["forced_severity_accuracy"] = right / len(outcomes)
        bounds["forced_severity_accuracy"] = wilson(right, len(outcomes))
    return Scores(figures, bounds, metrics.confusion(), list(outcomes))


def differences(expected: str, answered: str) -> dict[str, tuple[Any, Any]]:
    """Keys of the expected answer whose values differ, with both values; every key where the answer is no object."""
    wanted, got = parse(expected) or {}, parse(answered) or {}
    return {key: (wanted.get(key), got.get(key)) for key in {**wanted, **got} if wanted.get(key) != got.get(key)}
