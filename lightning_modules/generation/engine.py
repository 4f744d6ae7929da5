"""Greedy batched generation after one cached prompt prefix, free or constrained by a grammar.

All prompts of a task begin with the same tokens (system text and instruction, about 120 of 280). The model computes
them once, and their keys and values are copied to the front of each slot of the cache
(:mod:`lightning_modules.generation.kv_cache`). A slot whose answer has ended takes the next prompt, so that no row
waits for the longest answer of a batch. Meanwhile adapters and 4-bit layers are merged into one 16-bit copy, if the
memory suffices (:mod:`lightning_modules.generation.merged_weights`).

The tokens are those of ``model.generate`` called on one prompt at a time. A prompt that leaves no space for its answer
is cut in the middle, and ``GenerationOutput.prompt_tokens_cut`` counts the cut tokens. An answer that reaches the token
limit has ``GenerationOutput.stopped`` False.
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
    PrefixCache,
    common_prefix,
    eval_mode,
    max_positions,
    truncate_prompts,
)
from lightning_modules.generation.requests import GenerationOutput, GenerationRequest, LogitsConstraint
from lightning_modules.generation.scheduler import Progress, ProgressTracker, RunningSequence, Scheduler

if TYPE_CHECKING:
    from datamodules.tasks.base import Task
    from datamodules.tokenization.chat_format import ChatFormat

CACHE_SHARE = 0.7  #: fraction of the free memory that keys and values may take


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
    should_stop: Callable[[list[int]], bool] | None = None,
    on_answer: Callable[[int, GenerationOutput], None] | None = None,
) -> list[GenerationOutput]:
    """Generates one answer per content, greedily.

    Args:
        model: a Hugging Face causal language model, with or without PEFT adapters, on any device. It is in evaluation
            mode during the call.
        chat: converts contents to prompt ids, and ids to text.
        task: the task whose prompt is used.
        contents: the variable part of each prompt, for instance a finding as JSON.
        max_new_tokens: largest number of tokens of an answer.
        batch_size: number of slots; fewer are used if the cache would not fit the device's memory.
        progress: called after every step.
        constraint: restricts the tokens of each answer, for instance to a grammar.
        forced_prefix: for each content the tokens that its answer begins with; the model continues them. Their
            probability is not part of ``logprob``.
        should_stop: called after every step with an answer's tokens; True ends it as the token limit does.
        on_answer: called with index and answer when an answer ends.

    Returns:
        One answer per content, in the order of the contents.

    Raises:
        UserError: a prompt leaves no space for an answer within the positions that the model knows.
    """
    prefixes = forced_prefix if forced_prefix is not None else [()] * len(contents)
    requests = [
        GenerationRequest(task, content, max_new_tokens, constraint, ids)
        for content, ids in zip(contents, prefixes, strict=True)
    ]
    return generate_requests(
        model,
        chat,
        requests,
        batch_size=batch_size,
        progress=progress,
        should_stop=should_stop,
        on_answer=on_answer,
    )


def generate_requests(
    model: nn.Module,
    chat: ChatFormat,
    requests: Sequence[GenerationRequest],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    should_stop: Callable[[list[int]], bool] | None = None,
    on_answer: Callable[[int, GenerationOutput], None] | None = None,
) -> list[GenerationOutput]:
    """Generates the outputs of requests of any tasks together, greedily.

    Args:
        model: as in :func:`generate`.
        chat: converts contents to prompt ids, and ids to text.
        requests: the requests; the prompts of one task share a longer prefix than those of several tasks.
        batch_size: number of slots; fewer are used if the cache would not fit the device's memory.
        progress: called after every step.
        should_stop: called after every step with an output's tokens; True ends it as the token limit does.
        on_answer: called with index and output when an output ends.

    Returns:
        One output per request, in their order.

    Raises:
        UserError: a prompt leaves no space for an answer within the positions that the model knows.
    """
    if not requests:
        return []
    prompts, cuts = _encode_prompts(chat, requests, max_positions(model.config))
    outputs: list[GenerationOutput | None] = [None] * len(prompts)
    tracker = ProgressTracker(len(prompts), max(request.max_new_tokens for request in requests), progress)
    with ExitStack() as stack:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        for context in (eval_mode(model), torch.no_grad(), grouped_attention(base), merged(model)):
            stack.enter_context(context)
        prefix = PrefixCache(model, common_prefix(chat.prefix_ids(requests[0].task), prompts))
        sequences = [
            RunningSequence(index, request, [*prompt, *request.forced_prefix], list(request.forced_prefix))
            for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
        ]
        length = max(len(prompt) + request.max_new_tokens for prompt, request in zip(prompts, requests, strict=True))
        cache = SlotKVCache(prefix, _fitting_slots(prefix, min(batch_size, len(requests)), length), length)
        for sequence in Scheduler(cache, sequences, chat.eos_id, should_stop).run(tracker):
            text = chat.decode(sequence.tokens)
            output = GenerationOutput(text, sequence.ended, sequence.tokens, sequence.logprob, cuts[sequence.index])
            outputs[sequence.index] = output
            if on_answer is not None:
                on_answer(sequence.index, output)
    return [output for output in outputs if output is not None]


def constrain_outputs(
    free: Sequence[GenerationOutput],
    constraint: LogitsConstraint,
    eos_id: int,
    generate_from: Callable[[list[int], list[list[int]]], list[GenerationOutput]],
) -> list[GenerationOutput]:
    """Returns the outputs of greedy generation under a constraint, given those without it.

    If the constraint allows every token of a free output, the constrained output is the same. Only an output that
    violates the constraint is generated again, from its first token that is not allowed. An output that was cut
    continues from its end, if ``generate_from`` has a higher token limit.

    Args:
        free: outputs without constraint.
        constraint: constraint of the returned outputs.
        eos_id: id of the token that ended the outputs which stopped.
        generate_from: generates under the constraint, given indices of outputs and the tokens that each begins with.
    """
    outputs, allowed_tokens = list(free), dict[int, list[int]]()
    for index, output in enumerate(free):
        tokens = [*output.token_ids, *[eos_id] * output.stopped]
        accepted = constraint.accepts(tokens)
        if accepted < len(tokens) or not output.stopped:
            allowed_tokens[index] = tokens[:accepted]
    if allowed_tokens:
        generated = generate_from(list(allowed_tokens), list(allowed_tokens.values()))
        for index, output in zip(allowed_tokens, generated, strict=True):
            outputs[index] = output
    return outputs


def _encode_prompts(
    chat: ChatFormat, requests: Sequence[GenerationRequest], positions: int
) -> tuple[list[list[int]], list[int]]:
    """Returns the prompts of all requests, and the number of tokens cut from each; encodes each task's in one call."""
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for index, request in enumerate(requests):
        key = (id(request.task), request.max_new_tokens, request.prompt_ids is None)
        groups.setdefault(key, []).append(index)
    prompts: list[list[int]] = [[]] * len(requests)
    cuts = [0] * len(requests)
    for (_, max_new_tokens, encode), indices in groups.items():
        task, contents = requests[indices[0]].task, [requests[index].content for index in indices]
        whole = chat.prompt_ids(task, contents) if encode else [requests[index].prompt_ids or () for index in indices]
        truncated = truncate_prompts(chat, task, contents, whole, positions - max_new_tokens)
        for index, prompt, cut in zip(indices, *truncated, strict=True):
            prompts[index], cuts[index] = prompt, cut
    return prompts, cuts


def _fitting_slots(prefix: PrefixCache, wanted: int, length: int) -> int:
    """Returns how many of the wanted slots fit the free memory; at least 1."""
    fitting = CACHE_SHARE * free_memory(prefix.device) / (prefix.bytes_per_position * length)
    return max(1, min(wanted, int(fitting)))
