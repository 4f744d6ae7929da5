"""Comparison of two models on the same reference set: divergence of their predictions, and quality of their answers.

Shapes in names: N tokens of an expected answer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_modules.evaluation.evaluate import answer_pairs, score_predictions
from lightning_modules.generation.encoded_pairs import EncodedPairs
from lightning_modules.generation.prefix_cache import eval_mode

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair, Task
    from datamodules.tokenization.chat_format import ChatFormat

FIGURES = ("schema_valid", "json_cut", "severity_accuracy", "risk_error")  #: json_cut: the agent can parse it
CHUNK_SIZE = 64  #: tokens whose divergence is computed at once: 64 x 32,768 x 8 B = 17 MB


@dataclass(frozen=True)
class Record:
    """Measurements of one model on the reference set.

    Attributes:
        logprobs: for each pair float32 [N, V] on the CPU, at the tokens of the expected answer; 20 pairs of 100 tokens
            and a vocabulary of 32,768 are 260 MB.
        answers: the answers of greedy generation without constraint.
        figures: those of :data:`FIGURES` that the task has.
    """

    logprobs: list[Tensor]
    answers: list[str]
    figures: dict[str, float]


def record(
    model: nn.Module,
    chat: ChatFormat,
    task: Task,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
    progress: Callable[[float], None] = lambda share: None,
) -> Record:
    """Measures one model on the reference set.

    Args:
        model: as in :func:`lightning_modules.generation.engine.generate`.
        chat: chat format of the model's tokenizer.
        task: the task of the pairs.
        pairs: held-out pairs, the reference set.
        batch_size: answers generated together.
        progress: called with the fraction of the work that is done.
    """
    encoded = EncodedPairs.encode(chat, task, pairs)
    logprobs = [expected_logprobs(model, example) for example in encoded.examples]
    progress(0.1)
    outcomes = answer_pairs(model, encoded, batch_size=batch_size, progress=lambda done: progress(0.1 + 0.9 * done))
    figures = score_predictions(task, pairs, outcomes).figures
    measured = {name: figures[name] for name in FIGURES if not math.isnan(figures.get(name, math.nan))}
    return Record(logprobs, [outcome.text for outcome in outcomes], measured)


def expected_logprobs(model: nn.Module, example: Any) -> Tensor:
    """Computes log-probabilities of all tokens at each position of a completion, float32 [N, V] on the CPU."""
    ids = [*example.prompt_ids.tolist(), *example.completion_ids.tolist()]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    with eval_mode(model), torch.no_grad():
        logits_NV: Tensor = model(
            input_ids=torch.tensor([ids[:-1]], device=device), logits_to_keep=len(example.completion_ids)
        ).logits[0]
    return logits_NV.float().log_softmax(-1).cpu()


def divergence(trained: Sequence[Tensor], exported: Sequence[Tensor]) -> Tensor:
    """Computes the Kullback-Leibler divergence KL(trained || exported) in nats at each token, float64 [all tokens]."""
    tokens = []
    for p_NV, q_NV in zip(trained, exported, strict=True):
        for p, q in zip(torch.split(p_NV, CHUNK_SIZE), torch.split(q_NV, CHUNK_SIZE), strict=True):
            p, q = p.double(), q.double()
            tokens.append((p.exp() * (p - q)).sum(-1).clamp(min=0))
    return torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.float64)


def compare(trained: Record, exported: Record) -> dict[str, Any]:
    """Returns the certificate's figures for two models on the same reference set; a divergence of NaN is None."""
    kl = divergence(trained.logprobs, exported.logprobs)
    same = sum(a == b for a, b in zip(trained.answers, exported.answers, strict=True))
    return {
        "tokens": len(kl),
        "kl_mean": _finite(kl.mean().item()),
        "kl_max": _finite(kl.max().item()),
        "same_answers": same / len(trained.answers),
        "trained": trained.figures,
        "exported": exported.figures,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
