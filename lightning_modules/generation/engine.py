"""Greedy generation in slots behind one cached prompt prefix, free or held to a grammar.

Every prompt of a task begins with the same tokens (system text and instruction, about 120 of 280). They go through
the model once, alone; their keys and values lie before each slot of the cache
(:mod:`lightning_modules.generation.kv_cache`). A
slot whose answer has ended takes the next prompt, so that no row waits for the longest of a batch. Meanwhile adapters
and 4-bit layers are one 16-bit copy, where the memory is there (:mod:`lightning_modules.generation.merged_weights`).

The tokens are those of ``model.generate`` called on one prompt at a time. A prompt that leaves no room for its answer
is cut in the middle by rule and says so; an answer that reaches the token limit says so too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_modules.generation.kv_cache import SlotKVCache, grouped_attention
from lightning_modules.generation.merged_weights import free_memory, merged
from lightning_modules.generation.prefix_cache import (
    Prefix,
    bounded_prompts,
    common_prefix,
    evaluating,
    known_positions,
)
from lightning_modules.generation.requests import GenerationOutput, GenerationRequest, LogitsConstraint
from lightning_modules.generation.scheduler import Progress, ProgressTracker, RunningSequence, Scheduler

if TYPE_CHECKING:
    from datamodules.tasks.base import Task
    from datamodules.tokenization.chat_format import ChatFormat

CACHE_SHARE = 0.7  #: of the free memory that keys and values may take


def generate(
    model: nn.Module,
    chat: ChatFormat,
    task: Task,
    contents: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    progress: Progress | None = None,
    constraint: LogitsConstraint | None = None,
    forced_prefix: Sequence[Sequence[int]] | None = None,
    max_preamble_tokens: Callable[[list[int]], bool] | None = None,
    on_answer: Callable[[int, GenerationOutput], None] | None = None,
) -> list[GenerationOutput]:
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
        forced_prefix: for each content the tokens that its answer begins with; the model continues them. Their
            probability is not in ``logprob``.
        max_preamble_tokens: asked after every step with an answer's tokens; true ends it as the token limit would.
        on_answer: called with index and answer as answers end.

    Returns:
        One answer per content, in the order of the contents.

    Raises:
        UserError: a prompt leaves no room for an answer within the positions that the model knows.
    """
    tokens = forced_prefix if forced_prefix is not None else [()] * len(contents)
    questions = [
        GenerationRequest(task, content, max_new_tokens, constraint, ids)
        for content, ids in zip(contents, tokens, strict=True)
    ]
    return generate_requests(
        model,
        chat,
        questions,
        batch_size=batch_size,
        progress=progress,
        max_preamble_tokens=max_preamble_tokens,
        on_answer=on_answer,
    )


def generate_requests(
    model: nn.Module,
    chat: ChatFormat,
    questions: Sequence[GenerationRequest],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    max_preamble_tokens: Callable[[list[int]], bool] | None = None,
    on_answer: Callable[[int, GenerationOutput], None] | None = None,
) -> list[GenerationOutput]:
    """Answers questions of any tasks together, greedily.

    Args:
        model: see :func:`generate`, as all others.
        chat: turns contents into prompt ids and ids into text.
        questions: those of one task share more of their prompts.
        batch_size: slots; fewer where the cache would not fit the device's memory.
        progress: called after every step.
        max_preamble_tokens: asked after every step with an answer's tokens; true ends it as the token limit would.
        on_answer: called with index and answer as answers end.

    Returns:
        One answer per question, in their order.

    Raises:
        UserError: a prompt leaves no room for an answer within the positions that the model knows.
    """
    if not questions:
        return []
    prompts, cuts = _prompts(chat, questions, known_positions(model.config))
    answers: list[GenerationOutput | None] = [None] * len(prompts)
    share = ProgressTracker(len(prompts), max(question.max_new_tokens for question in questions), progress)
    with ExitStack() as stack:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        for context in (evaluating(model), torch.no_grad(), grouped_attention(base), merged(model)):
            stack.enter_context(context)
        prefix = Prefix(model, common_prefix(chat.prefix_ids(questions[0].task), prompts))
        rows = [
            RunningSequence(index, question, [*prompt, *question.forced_prefix], list(question.forced_prefix))
            for index, (prompt, question) in enumerate(zip(prompts, questions, strict=True))
        ]
        length = max(len(row.prompt) - len(row.tokens) + row.question.max_new_tokens for row in rows)
        slots = SlotKVCache(prefix, _slots(prefix, min(batch_size, len(rows)), length), length)
        for row in Scheduler(slots, rows, chat.eos_id, max_preamble_tokens).run(share):
            written = GenerationOutput(
                chat.decode(row.tokens, row.question.task), row.ended, row.tokens, row.logprob, cuts[row.index]
            )
            answers[row.index] = written
            if on_answer is not None:
                on_answer(row.index, written)
    return [written for written in answers if written is not None]


def _prompts(
    chat: ChatFormat, questions: Sequence[GenerationRequest], positions: int
) -> tuple[list[list[int]], list[int]]:
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
    free: Sequence[GenerationOutput],
    constraint: LogitsConstraint,
    eos_id: int,
    write: Callable[[list[int], list[list[int]]], list[GenerationOutput]],
) -> list[GenerationOutput]:
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
