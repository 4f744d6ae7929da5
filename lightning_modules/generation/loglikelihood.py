"""Log-likelihoods of given answers, without generation: the held-out loss, and the choice between a few answers.

Shapes in names: B rows, P prefix tokens, S tokens of a prompt after the prefix, L tokens in the cache, V vocabulary,
C choices, E tokens of the longest choice.

The model computes the prefix that all prompts of a task share once; its keys and values are copied to the front of each
row of every batch::

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
    PrefixCache,
    batches_by_length,
    common_prefix,
    eval_mode,
    max_positions,
)

if TYPE_CHECKING:
    from lightning_modules.generation.encoded_pairs import EncodedPairs


def completion_nll(
    model: nn.Module,
    encoded: EncodedPairs,
    *,
    batch_size: int = 16,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the negative log-likelihood of each pair's completion, including its end-of-sequence token.

    A prompt that is too long for the model is cut as in generation.

    Args:
        model: a Hugging Face causal language model, with or without PEFT adapters, on any device.
        encoded: the pairs and their token ids.
        batch_size: pairs per forward pass.
        progress: called with the fraction of the pairs that are done.

    Returns:
        float64 [n] sums over the completion's tokens (natural logarithm) and int64 [n] token counts, on the CPU: the
        held-out loss is ``nll.sum() / tokens.sum()``.
    """
    completions = encoded.completions
    prompts = encoded.truncated_prompts(max_positions(model.config) - max(map(len, completions)))
    nll_n = torch.zeros(len(encoded), dtype=torch.float64)
    tokens_n = torch.tensor([len(ids) for ids in completions])
    done = 0
    with eval_mode(model), torch.no_grad():
        prefix = PrefixCache(model, common_prefix(encoded.chat.prefix_ids(encoded.task), prompts))
        for batch in batches_by_length(
            [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], batch_size
        ):
            rows = [prompts[i] + completions[i] for i in batch]
            logprob_BC = _row_logprobs(prefix, rows, [len(completions[i]) for i in batch])
            nll_n[batch] = -logprob_BC.sum(1).cpu().double()
            done += len(batch)
            if progress is not None:
                progress(done / len(encoded))
    return nll_n, tokens_n


def forced_choice(
    model: nn.Module,
    encoded: EncodedPairs,
    stems: Sequence[str],
    choices: Sequence[str],
    *,
    batch_size: int = 16,
) -> Tensor:
    """Computes the log-likelihood of each choice as the continuation of an answer's stem, without generation.

    The choice with the highest value is the answer of a model that must choose one. This is a cheap measure during
    training, and it also applies to a model that cannot write JSON yet. Choices are compared as a whole, by the sum
    over their tokens.

    Args:
        model: a Hugging Face causal language model, with or without PEFT adapters, on any device.
        encoded: the pairs whose prompts are used, and their token ids.
        stems: the beginning of each answer, for instance ``{"tags":["ssh"],"severity":"``.
        choices: the texts to compare, none of them the beginning of another.
        batch_size: prompts per forward pass.

    Returns:
        float32 [n, choices] on the CPU.
    """
    rows, ends = [], []
    for prompt, tails in zip(encoded.prompts, _encode_choices(encoded, stems, choices), strict=True):
        shared = len(common_prefix(min(tails, key=len), tails))  # the stem's tokens: the same for every choice
        rows.append(prompt + tails[0][:shared])
        ends.append([tail[shared:] for tail in tails])
    result_NC = torch.zeros(len(rows), len(choices), dtype=torch.float32)
    with eval_mode(model), torch.no_grad():
        prefix = PrefixCache(model, common_prefix(encoded.chat.prefix_ids(encoded.task), rows))
        for batch in batches_by_length([len(row) for row in rows], batch_size):
            result_NC[batch] = _choice_logprobs(prefix, [rows[i] for i in batch], [ends[i] for i in batch]).cpu()
    return result_NC


def _encode_choices(encoded: EncodedPairs, stems: Sequence[str], choices: Sequence[str]) -> list[list[list[int]]]:
    """Returns the ids of ``stem + choice`` for each stem and choice, without an end-of-sequence token."""
    from datamodules.tasks.base import Pair

    name = encoded.task.name
    fillers = [  # a completion is encoded apart from its prompt, so that the content may be empty
        Pair(task=name, content="", completion=stem + choice, severity="", category="", findings=1)
        for stem in stems
        for choice in choices
    ]
    tails = [example.completion_ids.tolist()[:-1] for example in encoded.chat.encode(encoded.task, fillers)]
    return [tails[start : start + len(choices)] for start in range(0, len(tails), len(choices))]


def _row_logprobs(prefix: PrefixCache, rows: list[list[int]], scored: list[int]) -> Tensor:
    """Computes log-probabilities of each row's last ``scored`` tokens, float32 [B, max(scored)], zero before them."""
    keep = max(scored)
    ids_BS, mask_BL, position_BS, cache = prefix.prepare_batch(rows, new_tokens=0)
    # The last token predicts nothing; the one before the first scored token does.
    logits_BKV = prefix.logits(ids_BS, mask_BL, position_BS, cache, keep=keep + 1)[:, :-1]
    targets_BK = ids_BS[:, -keep:]
    logprob_BK = torch.stack(
        [  # row by row: a second copy of all logits would take hundreds of megabytes
            logits_KV.log_softmax(-1).gather(1, target_K[:, None])[:, 0]
            for logits_KV, target_K in zip(logits_BKV, targets_BK, strict=True)
        ]
    )
    counted_BK = torch.arange(keep, 0, -1, device=ids_BS.device) <= torch.tensor(scored, device=ids_BS.device)[:, None]
    return logprob_BK.masked_fill(~counted_BK, 0.0)


def _choice_logprobs(prefix: PrefixCache, rows: list[list[int]], ends: list[list[list[int]]]) -> Tensor:
    """Computes log-probabilities of each row's ends, float32 [B, C]; a row is computed once for all its ends."""
    longest = max(len(end) for choices in ends for end in choices)
    ids_BS, mask_BL, position_BS, cache = prefix.prepare_batch(rows, new_tokens=longest)
    logprob_BV = prefix.logits(ids_BS, mask_BL, position_BS, cache)[:, 0].log_softmax(-1)
    padded = [[end + [0] * (longest - len(end)) for end in choices] for choices in ends]
    ends_BCE = torch.tensor(padded, device=ids_BS.device)
    total_BC = logprob_BV.gather(1, ends_BCE[:, :, 0])
    if longest == 1:
        return total_BC
    rows_B, choices_C = ends_BCE.shape[:2]
    cache.batch_select_indices(torch.arange(rows_B, device=ids_BS.device).repeat_interleave(choices_C))
    mask = F.pad(mask_BL.repeat_interleave(choices_C, 0), (0, longest - 1), value=1)  # padding is last: harmless
    steps = torch.arange(1, longest, device=ids_BS.device)
    positions = position_BS[:, -1:].repeat_interleave(choices_C, 0) + steps
    flat_NE = ends_BCE.flatten(0, 1)
    logits = prefix.logits(flat_NE[:, :-1], mask, positions, cache, keep=longest - 1)
    logprob = logits.log_softmax(-1).gather(2, flat_NE[:, 1:, None])[:, :, 0].view(rows_B, choices_C, -1)
    lengths_BC = torch.tensor([[len(end) for end in choices] for choices in ends], device=ids_BS.device)
    return total_BC + (logprob * (steps < lengths_BC[:, :, None])).sum(2)
