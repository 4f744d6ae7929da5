"""A model's worth on held-out pairs: what it writes freely, and how likely it finds the true answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from datamodules.records import SEVERITIES
from lightning_modules.evaluation.answer_parsing import ParsedAnswer, parse, parse_answer
from lightning_modules.evaluation.confidence_intervals import bootstrap, intervals, wilson
from lightning_modules.evaluation.metrics import AnswerMetrics
from lightning_modules.generation.engine import constrained, generate, generate_requests
from lightning_modules.generation.loglikelihood import completion_nll, forced_choice
from lightning_modules.generation.prefix_cache import known_positions
from lightning_modules.generation.requests import GenerationOutput, GenerationRequest, LogitsConstraint

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair, Task
    from datamodules.tokenization.chat_format import ChatFormat

SCORED_ROWS = 32  #: answers whose likelihood is computed at once: 300 tokens of 49,152 logits are 2 GB then
HELD_ROOM = 4  #: times the room of a free answer for one that is held to its schema
SEVERITY = '"severity":"'  #: what comes before an answer's severity


@dataclass(frozen=True)
class PredictionResult:
    """What came of one pair.

    Attributes:
        text: the answer.
        complete: whether the model ended it; False: it ran into the token limit.
        nll: negative log-likelihood of the expected answer, NaN where there is no model (a baseline).
        tokens: tokens of the expected answer.
        prompt_tokens_cut: tokens of the content that did not fit the model's positions.
        forced: the severity that is most likely behind the expected answer's beginning (its tags, say), "" where that
            was not asked.
        held: what the model writes when a grammar holds it to the schema; None where that was not asked.
    """

    text: str
    complete: bool = True
    nll: float = math.nan
    tokens: int = 0
    prompt_tokens_cut: int = 0
    forced: str = ""
    held: PredictionResult | None = None


@dataclass(frozen=True)
class EvaluationScores:
    """The figures of one model or baseline on a sample.

    Attributes:
        figures: name -> value, NaN where nothing could be measured; ``loss`` is the held-out loss per token.
        intervals: name -> bounds of the 95 % interval, for the figures of the table.
        confusion: rows expected, columns answered severities, last column none; None where the task has none.
        groups: "category" and "severity" -> each one's name -> its figures, ``answers`` among them.
        reliability: for each tenth of ``probability_actionable`` that was answered: answers, mean answered, mean
            expected; None where the task has none.
        outcomes: one for each pair.
    """

    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    confusion: list[list[int]] | None
    groups: dict[str, dict[str, dict[str, float]]]
    reliability: list[tuple[float, float, float]] | None
    outcomes: list[PredictionResult]


def answer_pairs(
    model: nn.Module,
    chat: ChatFormat,
    task: Task,
    pairs: Sequence[Pair],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 25,
    forced: bool = False,
    constraint: LogitsConstraint | None = None,
    max_preamble_tokens: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> list[PredictionResult]:
    """Lets a model answer pairs freely and scores their expected answers.

    Args:
        model: as in :func:`lightning_modules.generation.engine.generate`.
        chat: of the model's tokenizer.
        task: of the pairs.
        pairs: whose answers are expected.
        max_new_tokens: limit of an answer; None is :func:`token_limit` of these pairs.
        batch_size: rows at once.
        forced: whether to ask also for the most likely severity without generation, behind the expected answer's
            beginning: its tags name what was seen, so this says how well the model rates what is named.
        constraint: a grammar that the answers are held to besides (:attr:`PredictionResult.held`); costs only what
            leaves it.
        max_preamble_tokens: a free answer that has no ``{`` after so many tokens is ended there, as at the token limit.
        progress: called with the share of the work done.
    """
    if not pairs:
        return []
    contents = [pair.content for pair in pairs]
    limit = max_new_tokens or token_limit(chat, task, pairs)
    share = 0.2  # of the time, for the likelihoods: a pass over all tokens costs about as much as 40 steps of a batch
    nll, tokens = completion_nll(
        model, chat, task, pairs, batch_size=min(batch_size, SCORED_ROWS), progress=lambda done: progress(share * done)
    )
    choices = forced_severities(model, chat, task, pairs, batch_size=batch_size) if forced else [""] * len(pairs)
    options: Any = {"max_new_tokens": limit, "batch_size": batch_size}
    answers = generate(
        model, chat, task, contents, **options, max_preamble_tokens=_hopeless(chat, max_preamble_tokens),
        progress=lambda done: progress(share + (0.9 - share) * done),
    )  # fmt: skip
    held: list[PredictionResult | None] = [None] * len(pairs)
    if constraint is not None:
        positions = known_positions(model.config)

        def write(indices: list[int], forced_prefix: list[list[int]]) -> list[GenerationOutput]:
            """Gives a schema's bounds the room to end an answer that goes round in circles."""
            some = [contents[index] for index in indices]
            rooms = [min(limit * HELD_ROOM, positions - len(prompt)) for prompt in chat.prompt_ids(task, some)]
            questions = [
                GenerationRequest(task, content, max(room, limit), constraint, tokens)
                for content, room, tokens in zip(some, rooms, forced_prefix, strict=True)
            ]
            return generate_requests(model, chat, questions, batch_size=batch_size)

        for index, written in enumerate(constrained(answers, constraint, chat.eos_id, write)):
            held[index] = PredictionResult(written.text, written.stopped)
    progress(1.0)
    return [
        PredictionResult(answer.text, answer.stopped, loss, count, answer.prompt_tokens_cut, choice, other)
        for answer, loss, count, choice, other in zip(
            answers, nll.tolist(), tokens.tolist(), choices, held, strict=True
        )
    ]


def forced_severities(
    model: nn.Module, chat: ChatFormat, task: Task, pairs: Sequence[Pair], *, batch_size: int = 25
) -> list[str]:
    """The likeliest severity behind each expected answer's beginning, "" where that has none; nothing is generated."""
    asked = [index for index, pair in enumerate(pairs) if SEVERITY in pair.completion]
    contents = [pairs[index].content for index in asked]
    stems = ["".join(pairs[index].completion.partition(SEVERITY)[:2]) for index in asked]
    choices = [""] * len(pairs)
    if asked:
        rows = min(batch_size, SCORED_ROWS)
        likelihoods = forced_choice(model, chat, task, contents, stems, SEVERITIES, batch_size=rows)
        for index, choice in zip(asked, likelihoods.argmax(1).tolist(), strict=True):
            choices[index] = SEVERITIES[choice]
    return choices


def _hopeless(chat: ChatFormat, tokens: int | None) -> Callable[[list[int]], bool] | None:
    if tokens is None:
        return None
    return lambda ids: len(ids) == tokens and "{" not in chat.decode(ids)


def token_limit(chat: ChatFormat, task: Task, pairs: Sequence[Pair]) -> int:
    """Room for one and a half times the longest expected answer: a longer one is on no way to be right."""
    longest = max(len(example.completion_ids) for example in chat.encode(task, pairs))
    return longest * 3 // 2 + 16


def score(
    task: Task,
    pairs: Sequence[Pair],
    outcomes: Sequence[PredictionResult],
    input_determined: Collection[str] = frozenset(),
) -> EvaluationScores:
    """Turns outcomes into figures; no communication between ranks: all outcomes are here.

    Args:
        task: of the pairs.
        pairs: the questions.
        outcomes: one for each.
        input_determined: categories whose severity the input tells
        (:func:`lightning_modules.evaluation.baselines.input_determined_categories`); the
            accuracy in these is a figure of its own.
    """
    judged = [parse_answer(task, pair, item.text, item.complete) for pair, item in zip(pairs, outcomes, strict=True)]
    metrics = _metrics(task, judged)
    figures, bounds = metrics.results(), intervals(judged)
    figures["prompts_cut"] = _share(item.prompt_tokens_cut > 0 for item in outcomes)
    nll_N, tokens_N = np.array([item.nll for item in outcomes]), np.array([item.tokens for item in outcomes])
    if len(nll_N) and not np.isnan(nll_N).any():
        figures["loss"] = float(nll_N.sum() / tokens_N.sum())
        bounds["loss"] = bootstrap(lambda index: nll_N[index].sum(1) / tokens_N[index].sum(1), len(nll_N))
    forced = [(item.forced, one.expected.get("severity")) for item, one in zip(outcomes, judged, strict=True)]
    _agreement("forced_severity_accuracy", [pair for pair in forced if pair[0]], figures, bounds)
    severities = [
        ((one.answer or {}).get("severity"), one.expected.get("severity"))
        for one in judged
        if one.category in input_determined
    ]
    _agreement("told_severity_accuracy", severities, figures, bounds)
    groups = {key: _by(task, judged, key) for key in ("category", "severity")}
    return EvaluationScores(figures, bounds, metrics.confusion(), groups, metrics.reliability(), list(outcomes))


def _metrics(task: Task, judged: Sequence[ParsedAnswer]) -> AnswerMetrics:
    metrics = AnswerMetrics(task, sync_on_compute=False)
    metrics.update(judged)
    return metrics


def _by(task: Task, judged: Sequence[ParsedAnswer], key: str) -> dict[str, dict[str, float]]:
    """Figures of the answers that share a category or severity, the most frequent first."""
    parts: dict[str, list[ParsedAnswer]] = {}
    for item in judged:
        parts.setdefault(getattr(item, key), []).append(item)
    ranked = sorted(parts.items(), key=lambda part: (-len(part[1]), part[0]))
    return {name: _metrics(task, part).results() for name, part in ranked if name}


def _agreement(
    name: str, said: Sequence[tuple[Any, Any]], figures: dict[str, float], bounds: dict[str, tuple[float, float]]
) -> None:
    """The share of equal pairs, with its interval; nothing where there is no pair."""
    if said:
        right = sum(answered == expected for answered, expected in said)
        figures[name], bounds[name] = right / len(said), wilson(right, len(said))


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else math.nan


def differences(expected: str, answered: str) -> dict[str, tuple[Any, Any]]:
    """Keys of the expected answer whose values differ, with both values; every key where the answer is no object."""
    wanted, got = parse(expected) or {}, parse(answered) or {}
    return {key: (wanted.get(key), got.get(key)) for key in {**wanted, **got} if wanted.get(key) != got.get(key)}
