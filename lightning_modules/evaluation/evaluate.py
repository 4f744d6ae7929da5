"""Evaluation of a model on held-out pairs: the answers that it generates, and the likelihood of the true answers."""

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
from lightning_modules.generation.encoded_pairs import EncodedPairs
from lightning_modules.generation.engine import constrain_outputs, generate_requests
from lightning_modules.generation.loglikelihood import completion_nll, forced_choice
from lightning_modules.generation.prefix_cache import max_positions
from lightning_modules.generation.requests import GenerationOutput, GenerationRequest, LogitsConstraint

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair, Task
    from datamodules.tokenization.chat_format import ChatFormat

SCORED_ROWS = 32  #: pairs per forward pass for likelihoods: the logits of 300 tokens of 49,152 are 2 GB then
CONSTRAINED_LIMIT_FACTOR = 4  #: token limit of a constrained answer, as a multiple of that of a free answer
SEVERITY = '"severity":"'  #: the text before an answer's severity
LIKELIHOOD_SHARE = 0.2  #: of the time: a pass over all tokens takes about as long as 40 steps of a batch


@dataclass(frozen=True)
class PredictionResult:
    """The model's result for one pair.

    Attributes:
        text: the answer.
        complete: True if the model ended it; False if it was cut at the token limit.
        nll: negative log-likelihood of the expected answer; NaN for a baseline, which is not a language model.
        tokens: number of tokens of the expected answer.
        prompt_tokens_cut: tokens of the content that did not fit the model's positions.
        forced: the most likely severity after the beginning of the expected answer (its tags, for instance); "" if it
            was not computed.
        constrained: the result with a grammar that constrains the answer to the schema; None if it was not generated.
    """

    text: str
    complete: bool = True
    nll: float = math.nan
    tokens: int = 0
    prompt_tokens_cut: int = 0
    forced: str = ""
    constrained: PredictionResult | None = None


@dataclass(frozen=True)
class EvaluationScores:
    """The figures of one model or baseline on a sample.

    Attributes:
        figures: name -> value, NaN if nothing could be measured; ``loss`` is the held-out loss per token.
        intervals: name -> bounds of the 95 % interval, for the figures of the table.
        confusion: rows are expected severities, columns answered ones, the last column no severity; None if the task
            has no severity.
        groups: "category" and "severity" -> name of each -> its figures, including ``answers``, the number of answers.
        reliability: for each tenth of ``probability_actionable`` with answers: number of answers, mean answered and
            mean expected probability; None if the task has no such field.
        outcomes: one result per pair.
    """

    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    confusion: list[list[int]] | None
    groups: dict[str, dict[str, dict[str, float]]]
    reliability: list[tuple[float, float, float]] | None
    outcomes: list[PredictionResult]


def answer_pairs(
    model: nn.Module,
    encoded: EncodedPairs,
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 25,
    forced: bool = False,
    constraint: LogitsConstraint | None = None,
    max_preamble_tokens: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> list[PredictionResult]:
    """Generates a model's answers to pairs without constraint, and computes the likelihood of the expected answers.

    Args:
        model: as in :func:`lightning_modules.generation.engine.generate`.
        encoded: the pairs of one task and their token ids.
        max_new_tokens: largest number of tokens of an answer; None is :func:`token_limit` of these pairs.
        batch_size: answers generated together.
        forced: True computes the most likely severity after the beginning of the expected answer too, without
            generation. The tags in that beginning name the evidence, so this measures how well the model rates it.
        constraint: a grammar under which the answers are generated too (:attr:`PredictionResult.constrained`); only
            answers that violate it are generated twice.
        max_preamble_tokens: a free answer without ``{`` in its first ``max_preamble_tokens`` tokens is cut there, as at
            the token limit.
        progress: called with the fraction of the work that is done.

    Returns:
        One result per pair, in their order.
    """
    if not encoded:
        return []
    limit = max_new_tokens or token_limit(encoded)
    nll, tokens = completion_nll(
        model, encoded, batch_size=min(batch_size, SCORED_ROWS), progress=lambda done: progress(LIKELIHOOD_SHARE * done)
    )
    choices = forced_severities(model, encoded, batch_size=batch_size) if forced else [""] * len(encoded)
    requests = [
        GenerationRequest(encoded.task, content, limit, prompt_ids=prompt)
        for content, prompt in zip(encoded.contents, encoded.prompts, strict=True)
    ]
    answers = generate_requests(
        model, encoded.chat, requests, batch_size=batch_size,
        should_stop=_preamble_check(encoded.chat, encoded.task, max_preamble_tokens),
        progress=lambda done: progress(LIKELIHOOD_SHARE + (0.9 - LIKELIHOOD_SHARE) * done),
    )  # fmt: skip
    constrained: list[PredictionResult | None] = [None] * len(encoded)
    if constraint is not None:
        outputs = _constrained_outputs(model, encoded, answers, constraint, limit, batch_size)
        constrained = [PredictionResult(output.text, output.stopped) for output in outputs]
    progress(1.0)
    return [
        PredictionResult(answer.text, answer.stopped, loss, count, answer.prompt_tokens_cut, choice, other)
        for answer, loss, count, choice, other in zip(
            answers, nll.tolist(), tokens.tolist(), choices, constrained, strict=True
        )
    ]


def _constrained_outputs(
    model: nn.Module,
    encoded: EncodedPairs,
    free: Sequence[GenerationOutput],
    constraint: LogitsConstraint,
    limit: int,
    batch_size: int,
) -> list[GenerationOutput]:
    """Generates the answers under a constraint; the token limit is high enough for a repetitive answer to end."""
    contents, prompts, positions = encoded.contents, encoded.prompts, max_positions(model.config)

    def generate_from(indices: list[int], forced_prefixes: list[list[int]]) -> list[GenerationOutput]:
        limits = [min(limit * CONSTRAINED_LIMIT_FACTOR, positions - len(prompts[index])) for index in indices]
        requests = [
            GenerationRequest(encoded.task, contents[index], max(most, limit), constraint, prefix, prompts[index])
            for index, most, prefix in zip(indices, limits, forced_prefixes, strict=True)
        ]
        return generate_requests(model, encoded.chat, requests, batch_size=batch_size)

    return constrain_outputs(free, constraint, encoded.chat.eos_id, generate_from)


def forced_severities(model: nn.Module, encoded: EncodedPairs, *, batch_size: int = 25) -> list[str]:
    """Returns the most likely severity after the beginning of each expected answer, without generation.

    Args:
        model: as in :func:`lightning_modules.generation.engine.generate`.
        encoded: the pairs of one task and their token ids.
        batch_size: prompts per forward pass, at most :data:`SCORED_ROWS`.

    Returns:
        One severity per pair; "" for a pair whose expected answer has no severity.
    """
    indices = [index for index, pair in enumerate(encoded.pairs) if SEVERITY in pair.completion]
    choices = [""] * len(encoded)
    if indices:
        stems = ["".join(encoded.pairs[index].completion.partition(SEVERITY)[:2]) for index in indices]
        rows = min(batch_size, SCORED_ROWS)
        likelihoods = forced_choice(model, encoded.select(indices), stems, SEVERITIES, batch_size=rows)
        for index, choice in zip(indices, likelihoods.argmax(1).tolist(), strict=True):
            choices[index] = SEVERITIES[choice]
    return choices


def _preamble_check(chat: ChatFormat, task: Task, tokens: int | None) -> Callable[[list[int]], bool] | None:
    if tokens is None or task.answer_schema.get("type") == "string":
        return None
    return lambda ids: len(ids) == tokens and "{" not in chat.decode(ids)


def token_limit(encoded: EncodedPairs) -> int:
    """Returns one and a half times the tokens of the longest expected answer, since longer answers are not correct."""
    longest = max(map(len, encoded.completions))
    return longest * 3 // 2 + 16


def score_predictions(
    task: Task,
    pairs: Sequence[Pair],
    outcomes: Sequence[PredictionResult],
    input_determined: Collection[str] = frozenset(),
) -> EvaluationScores:
    """Computes the figures of predictions. All predictions are here, so ranks do not communicate.

    Args:
        task: the task of the pairs.
        pairs: the prompts and their expected answers.
        outcomes: one result per pair.
        input_determined: categories whose severity the input determines
            (:func:`lightning_modules.evaluation.baselines.input_determined_categories`); the accuracy in these is a
            figure of its own.
    """
    answers = [parse_answer(task, pair, item.text, item.complete) for pair, item in zip(pairs, outcomes, strict=True)]
    metrics = _metrics(task, answers)
    figures, bounds = metrics.results(), intervals(answers)
    figures["prompts_cut"] = _share(item.prompt_tokens_cut > 0 for item in outcomes)
    nll_N, tokens_N = np.array([item.nll for item in outcomes]), np.array([item.tokens for item in outcomes])
    if len(nll_N) and not np.isnan(nll_N).any():
        figures["loss"] = float(nll_N.sum() / tokens_N.sum())
        bounds["loss"] = bootstrap(lambda index: nll_N[index].sum(1) / tokens_N[index].sum(1), len(nll_N))
    forced = [(item.forced, one.expected.get("severity")) for item, one in zip(outcomes, answers, strict=True)]
    _add_agreement("forced_severity_accuracy", [pair for pair in forced if pair[0]], figures, bounds)
    severities = [
        ((one.answer or {}).get("severity"), one.expected.get("severity"))
        for one in answers
        if one.category in input_determined
    ]
    _add_agreement("input_determined_severity_accuracy", severities, figures, bounds)
    groups = {key: _by(task, answers, key) for key in ("category", "severity")}
    return EvaluationScores(figures, bounds, metrics.confusion(), groups, metrics.reliability(), list(outcomes))


def _metrics(task: Task, answers: Sequence[ParsedAnswer]) -> AnswerMetrics:
    metrics = AnswerMetrics(task, sync_on_compute=False)
    metrics.update(answers)
    return metrics


def _by(task: Task, answers: Sequence[ParsedAnswer], key: str) -> dict[str, dict[str, float]]:
    """Computes the figures of the answers that share a category or severity, the most frequent first."""
    parts: dict[str, list[ParsedAnswer]] = {}
    for item in answers:
        parts.setdefault(getattr(item, key), []).append(item)
    ranked = sorted(parts.items(), key=lambda part: (-len(part[1]), part[0]))
    return {name: _metrics(task, part).results() for name, part in ranked if name}


def _add_agreement(
    name: str, values: Sequence[tuple[Any, Any]], figures: dict[str, float], bounds: dict[str, tuple[float, float]]
) -> None:
    """Adds the fraction of (answered, expected) values that are equal, and its interval, unless there are none."""
    if values:
        right = sum(answered == expected for answered, expected in values)
        figures[name], bounds[name] = right / len(values), wilson(right, len(values))


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else math.nan


def differences(expected: str, answered: str) -> dict[str, tuple[Any, Any]]:
    """Returns the keys whose values differ, with both values; every key if the answer is not a JSON object.

    If the expected answer is plain text or an array, the key ``answer`` has both texts.
    """
    wanted, got = parse(expected), parse(answered) or {}
    if wanted is None:  # plain text or an array
        return {"answer": (expected, answered)} if answered != expected else {}
    return {key: (wanted.get(key), got.get(key)) for key in {**wanted, **got} if wanted.get(key) != got.get(key)}
