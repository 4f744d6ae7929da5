"""How likely a model finds given answers: the held-out loss, and the choice between a few, without generation.

Shapes in names: B rows, P prefix tokens, S tokens of the rest of a prompt, L tokens in the cache, V vocabulary,
C choices, E tokens of the longest choice.

The prefix that all prompts of a task share goes through the model once; its keys and values are copied before each row
of every batch::

    cache   | prefix (copied) | padding, rest of the prompt and the answer |
    mask    | 1 1 1 1 1 1 1 1 | 0 0 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 |
    position  0 ............P-1     P ....................................

Masks and positions are given explicitly, so that padding between prefix and prompt changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.generation.prefix_cache import (
    Prefix,
    batches_by_length,
    bounded_prompts,
    common_prefix,
    evaluating,
    known_positions,
)

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair, Task
    from datamodules.tokenization.chat_format import ChatFormat


def completion_nll(
    model: nn.Module,
    chat: ChatFormat,
    task: Task,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each pair's completion, its end-of-sequence token included.

    A prompt that is too long for the model is cut by the same rule as in generation.

    Returns:
        float64 [n] sums over the completion's tokens (natural logarithm) and int64 [n] token counts, on the CPU: the
        held-out loss is ``nll.sum() / tokens.sum()``.
    """
    examples = chat.encode(task, pairs)
    completions = [example.completion_ids.tolist() for example in examples]
    room = known_positions(model.config) - max(map(len, completions))
    prompts, _ = bounded_prompts(chat, task, [pair.content for pair in pairs], room)
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
    stems: Sequence[str],
    choices: Sequence[str],
    *,
    batch_size: int = 16,
) -> Tensor:
    """Log-likelihood of each choice as the answer's continuation after a stem; nothing is generated.

    The choice with the highest value is what the model would say if it had to pick: a cheap measure while training
    that also works on a model that cannot write JSON yet. Choices are compared whole, by the sum over their tokens.

    Args:
        model: a Hugging Face causal language model, with or without PEFT adapters, on any device.
        chat: turns contents into prompt ids.
        task: whose prompt is used.
        contents: the part of the prompt that differs (a finding as JSON, say).
        stems: how each answer begins, for instance ``{"tags":["ssh"],"severity":"``.
        choices: the texts to compare, none of them the beginning of another.
        batch_size: contents at once.

    Returns:
        float32 [n, choices] on the CPU.
    """
    from datamodules.tasks.base import Pair

    fillers = [
        Pair(task=task.name, content=content, completion=stem + choice, severity="", category="", findings=1)
        for content, stem in zip(contents, stems, strict=True)
        for choice in choices
    ]
    examples = chat.encode(task, fillers)
    rows, ends = [], []
    for start in range(0, len(examples), len(choices)):
        group = examples[start : start + len(choices)]
        tails = [example.completion_ids.tolist()[:-1] for example in group]  # without end of sequence
        shared = len(common_prefix(min(tails, key=len), tails))  # the stem's tokens: the same for every choice
        rows.append(group[0].prompt_ids.tolist() + tails[0][:shared])
        ends.append([tail[shared:] for tail in tails])
    result_NC = torch.zeros(len(rows), len(choices), dtype=torch.float32)
    with evaluating(model), torch.no_grad():
        prefix = Prefix(model, common_prefix(chat.prefix_ids(task), rows))
        for batch in batches_by_length([len(row) for row in rows], batch_size):
            result_NC[batch] = _choice_logprobs(prefix, [rows[i] for i in batch], [ends[i] for i in batch]).cpu()
    return result_NC


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


def _choice_logprobs(prefix: Prefix, rows: list[list[int]], ends: list[list[list[int]]]) -> Tensor:
    """Log-probability of each of a row's ends after it, float32 [B, C]; a row is computed once for all its ends."""
    longest = max(len(end) for choices in ends for end in choices)
    ids_BS, mask_BL, position_BS, cache = prefix.rest(rows, room=longest)
    logprob_BV = prefix.logits(ids_BS, mask_BL, position_BS, cache)[:, 0].log_softmax(-1)
    padded = [[end + [0] * (longest - len(end)) for end in choices] for choices in ends]
    ends_BCE = torch.tensor(padded, device=ids_BS.device)
    total_BC = logprob_BV.gather(1, ends_BCE[:, :, 0])
    if longest == 1:
        return total_BC
    rows_B, choices_C = ends_BCE.shape[:2]
    cache.batch_select_indices(torch.arange(rows_B, device=ids_BS.device).repeat_interleave(choices_C))
    mask = F.pad(mask_BL.repeat_interleave(choices_C, 0), (0, longest - 1), value=1)  # padding comes last: harmless
    steps = torch.arange(1, longest, device=ids_BS.device)
    positions = position_BS[:, -1:].repeat_interleave(choices_C, 0) + steps
    flat_NE = ends_BCE.flatten(0, 1)
    logits = prefix.logits(flat_NE[:, :-1], mask, positions, cache, keep=longest - 1)
    logprob = logits.log_softmax(-1).gather(2, flat_NE[:, 1:, None])[:, :, 0].view(rows_B, choices_C, -1)
    lengths_BC = torch.tensor([[len(end) for end in choices] for choices in ends], device=ids_BS.device)
    return total_BC + (logprob * (steps < lengths_BC[:, :, None])).sum(2)
