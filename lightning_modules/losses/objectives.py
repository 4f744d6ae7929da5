"""Training objectives: sums over supervised tokens, computed in chunks so that full logits are never in memory.

Shapes in names: N supervised tokens, C channels, V vocabulary.

An objective returns sums; the module divides them once by the supervised tokens of the whole optimizer step. The logits
of 5,000 tokens in float32, their softmax and its gradient would take 2 GB at V = 32,768, so only one chunk of them is
in memory at a time. With a frozen head the gradient of the hidden states is computed in the forward pass as well: the
head is multiplied twice instead of three times, and nothing of size V is kept. A head that is trained recomputes its
chunks in the backward pass.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from datamodules.batch import IGNORE_INDEX
from datamodules.errors import UserError
from lightning_modules.kernels.cross_entropy_kl import CrossEntropyKL
from lightning_modules.losses.teacher_cache import CachedTeacher, TeacherCache, cache_key
from lightning_modules.losses.teacher_shards import Targets
from lightning_modules.models.backbone import Backbone
from lightning_modules.models.decoder import Predictions

if TYPE_CHECKING:
    from datamodules.findings import FindingsDataModule

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class Objective(ABC):
    """A loss over supervised tokens. Subclasses are frozen dataclasses of plain data, so checkpoints can store them."""

    @property
    def teacher_backbone(self) -> Backbone | Literal["base"] | None:
        """The teacher that must be built for the call; None without a teacher."""
        return None

    @property
    def layers(self) -> dict[str, str]:
        """The student's layers whose hidden states the call needs, each with the teacher's layer, by name."""
        return {}

    @property
    def sum_names(self) -> tuple[str, ...] | None:
        """The names of the sums that the call returns; None if they are not known before it."""
        return None

    def cached_teacher(self, data: FindingsDataModule, student: Backbone) -> CachedTeacher | None:
        """Opens the cache of the teacher's predictions on this data; returns None without a cache."""
        return None

    @abstractmethod
    def __call__(
        self, student: Predictions, labels_N: Tensor, teacher: Predictions | Targets | None = None
    ) -> dict[str, Tensor]:
        """Computes sums over the labels that are not -100.

        Args:
            student: hidden states and head of the model that is trained.
            labels_N: int64, the token to predict at each position; -100 is ignored.
            teacher: the frozen model's predictions at the same positions, or their cached form; None without a teacher.

        Returns:
            Scalars: ``loss``, which is minimised; ``correct``, the number of tokens whose label has the highest logit;
            and further parts that are logged. All except ``loss`` may be detached.
        """


@dataclass(frozen=True)
class CompletionCrossEntropy(Objective):
    """Cross-entropy of the labels: maximum likelihood of the completions."""

    chunk_size: int = 1024
    """Number of tokens whose logits are in memory at the same time."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """See :class:`Objective`."""
        return ("loss", "correct")

    def __call__(
        self, student: Predictions, labels_N: Tensor, teacher: Predictions | Targets | None = None
    ) -> dict[str, Tensor]:
        """See :class:`Objective`."""

        def sums(hidden_NC: Tensor, labels_N: Tensor) -> tuple[Tensor, ...]:
            loss, correct, *_ = CrossEntropyKL.apply(student.head(hidden_NC), labels_N, None, 1.0, 0.0, 1.0)
            return loss, correct

        loss, correct = _chunked(sums, self.chunk_size, student, labels_N)
        return {"loss": loss, "correct": correct}


@dataclass(frozen=True)
class HiddenMatch:
    """Hidden-state matching loss: pulls the hidden states of named layers to the teacher's (FitNets, arXiv 1412.6550).

    The loss of a supervised token is the mean squared difference divided by the mean square of the teacher's state. It
    is relative to the teacher's signal, so one weight fits layers and models of any size. Where the widths differ, a
    linear map of the student's states is trained with the model.
    """

    layers: dict[str, str]
    """Student's layer to teacher's layer, by their names in the decoder (``layers.15: layers.23``)."""
    weight: float = 1.0
    """Weight of this loss, which is added to ``alpha T^2 D + (1 - alpha) CE``."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("objective.hidden.layers is empty; name at least one, as layers.15: layers.15")
        if not self.weight > 0:
            raise ValueError(
                f"objective.hidden.weight {self.weight} is not positive; leave objective.hidden out instead"
            )

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels_N: Tensor) -> Tensor:
        """Computes the mean over layers, summed over the labelled positions."""
        total = labels_N.new_zeros((), dtype=torch.float32)
        for student_NC, teacher_NC in zip(student, teacher, strict=True):
            teacher_NC = teacher_NC.to(torch.promote_types(teacher_NC.dtype, torch.float32))
            relative_N = (student_NC - teacher_NC).square().mean(dim=1) / teacher_NC.square().mean(dim=1)
            total = total + (relative_N * (labels_N != IGNORE_INDEX)).sum() / len(self.layers)
        return total


@dataclass(frozen=True)
class Distillation(Objective):
    """Distillation loss: ``alpha T^2 D(teacher, student) + (1 - alpha) CE`` (Hinton et al., arXiv 1503.02531).

    D compares the softmaxes of both models' logits divided by T. T^2 keeps the size of its gradient as T grows. ``kl``
    of the result is D itself, with the teacher's entropy and without alpha and T^2: zero where both models agree.

    With a cache, D is computed over the teacher's K most probable tokens and one bucket for all others. Merging
    outcomes never increases a divergence, so this is a lower bound of the full one.
    """

    teacher: Backbone | Literal["base"] = "base"
    """Another model with the student's tokenizer, or base: the student's own base without the adapter, which takes no
    memory. A Backbone with an adapter, and with the student's model, revision, quantization and dtype, shares the
    student's weights and takes the memory of its adapter only."""
    alpha: float = 0.5
    """Weight of the teacher, in [0, 1]; at 0 it is neither loaded nor computed."""
    temperature: float = 2.0
    """Divides the logits of both models; above 1 the teacher's less probable tokens get more weight."""
    divergence: Divergence = "forward_kl"
    """forward_kl: KL(teacher || student), covers all modes of the teacher; reverse_kl: KL(student || teacher), seeks
    its main mode; jsd: the generalised Jensen-Shannon divergence between them (GKD, arXiv 2306.13649, eq. 1)."""
    beta: float = 0.5
    """Weight of the teacher in the mixture of jsd, in (0, 1)."""
    chunk_size: int = 1024
    """Number of tokens whose logits, of both models, are in memory at the same time."""
    hidden: HiddenMatch | None = None
    """Hidden-state matching loss to add, logged as ``hidden``; null for none."""
    cache: TeacherCache | None = None
    """Cache that ``python main.py cache-teacher`` has written; no teacher is loaded then."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"objective.alpha {self.alpha} is not in [0, 1]; 0.5 weighs teacher and labels alike")
        if not self.temperature > 0:
            raise ValueError(f"objective.temperature {self.temperature} is not positive; 2.0 is usual")
        if not 0 < self.beta < 1:
            raise ValueError(f"objective.beta {self.beta} is not in (0, 1); its limits are forward_kl and reverse_kl")
        if self.hidden is not None and self.cache is not None:
            raise ValueError("objective.hidden: a cache holds no hidden states; leave out objective.hidden or cache")

    @property
    def _uses_teacher(self) -> bool:
        return self.alpha > 0 or self.hidden is not None

    @property
    def sum_names(self) -> tuple[str, ...]:
        """See :class:`Objective`."""
        names = ("loss", "correct", "ce")
        return (*names, *(("kl",) if self._uses_teacher else ()), *(("hidden",) if self.hidden is not None else ()))

    @property
    def teacher_backbone(self) -> Backbone | Literal["base"] | None:
        """The teacher; None if its weight is 0 or its predictions are in a cache."""
        return self.teacher if self._uses_teacher and self.cache is None else None

    @property
    def layers(self) -> dict[str, str]:
        """See :class:`Objective`."""
        return self.hidden.layers if self.hidden is not None else {}

    def cached_teacher(self, data: FindingsDataModule, student: Backbone) -> CachedTeacher | None:
        """See :class:`Objective`."""
        if self.alpha == 0 or self.cache is None:
            return None
        return CachedTeacher(self.cache, cache_key(data, self.teacher, student, self.cache), self.temperature)

    def __call__(
        self, student: Predictions, labels_N: Tensor, teacher: Predictions | Targets | None = None
    ) -> dict[str, Tensor]:
        """See :class:`Objective`; adds ``ce``, ``kl`` and ``hidden``."""
        if not self._uses_teacher:
            plain = CompletionCrossEntropy(self.chunk_size)(student, labels_N)
            return {**plain, "ce": plain["loss"].detach()}
        if teacher is None:
            raise UserError(
                "objective.cache: the batches hold no targets of a teacher. Fix: set data.class_path to "
                "datamodules.FindingsDataModule, which reads them from the cache"
            )
        weights = (1 - self.alpha, self.alpha * self.temperature**2)
        log_probs: Callable[..., tuple[Tensor, Tensor]]
        if isinstance(teacher, Targets):
            log_probs = self._over_buckets(teacher.vocabulary)
            teaching: tuple[Tensor, ...] = (teacher.ids_NK, teacher.log_probs_NK, teacher.tail_N)
        else:
            log_probs, teaching = self._over_vocabulary(teacher.head), (teacher.hidden_NC,)

        def sums_of(hidden_NC: Tensor, labels_N: Tensor, *teaching: Tensor) -> tuple[Tensor, ...]:
            logits_NV = student.head(hidden_NC)
            if self.divergence == "forward_kl" and isinstance(teacher, Predictions):
                with torch.no_grad():
                    teacher_NV = teacher.head(*teaching)
                return CrossEntropyKL.apply(logits_NV, labels_N, teacher_NV, *weights, self.temperature)
            kl_N = self._divergence(*log_probs(logits_NV, *teaching))
            kl = (kl_N * (labels_N != IGNORE_INDEX)).sum()
            loss, correct, ce, _ = CrossEntropyKL.apply(logits_NV, labels_N, None, weights[0], 0.0, 1.0)
            return loss + weights[1] * kl, correct, ce, kl.detach()

        totals = _chunked(sums_of, self.chunk_size, student, labels_N, *teaching)
        sums = dict(zip(("loss", "correct", "ce", "kl"), totals, strict=True))
        if self.hidden is None:
            return sums
        assert isinstance(teacher, Predictions)
        hidden = self.hidden(student.states, teacher.states, labels_N)
        return {**sums, "loss": sums["loss"] + self.hidden.weight * hidden, "hidden": hidden.detach()}

    def _over_vocabulary(self, head: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        """Returns a function of logits and the teacher's hidden states: both log-probabilities at T [N, V]."""

        def log_probs(logits_NV: Tensor, hidden_NC: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                teacher_NV = head(hidden_NC).to(logits_NV)
            # Some models round their vocabulary up; logits after the end of the tokenizer's vocabulary are no tokens
            vocabulary = min(logits_NV.shape[-1], teacher_NV.shape[-1])
            both = (logits_NV[:, :vocabulary], teacher_NV[:, :vocabulary])
            student_NV, teacher_NV = (log_softmax(logits / self.temperature, dim=-1) for logits in both)
            return student_NV, teacher_NV

        return log_probs

    def _over_buckets(self, vocabulary: int | None) -> Callable[..., tuple[Tensor, Tensor]]:
        """Returns such a function for cached targets, over the K tokens and the rest [N, K + 1]."""

        def log_probs(logits_NV: Tensor, ids_NK: Tensor, kept_NK: Tensor, tail_N: Tensor) -> tuple[Tensor, Tensor]:
            scaled_NV = logits_NV[:, :vocabulary] / self.temperature
            rest_N1 = scaled_NV.scatter(1, ids_NK, -torch.inf).logsumexp(dim=-1, keepdim=True)
            student = torch.cat([scaled_NV.gather(1, ids_NK), rest_N1], dim=1)
            teacher = torch.cat([kept_NK.to(student) / self.temperature, tail_N.to(student)[:, None]], dim=1)
            # log_softmax subtracts the log of the sum over the K + 1 parts
            return log_softmax(student, dim=-1), log_softmax(teacher, dim=-1)

        return log_probs

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Computes the divergence [N] between log-probabilities over outcomes [N, ...]."""
        if self.divergence == "forward_kl":
            return _kl(teacher, student)
        if self.divergence == "reverse_kl":
            return _kl(student, teacher)
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        return self.beta * _kl(teacher, mixture) + (1 - self.beta) * _kl(student, mixture)


def _kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(dim=-1)


def _chunked(
    function: Callable[..., tuple[Tensor, ...]], chunk: int, student: Predictions, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Adds up the results of a function over chunks of the student's hidden states and of other tensors.

    Args:
        function: takes one chunk of each tensor; returns a loss, and other sums that need no gradient.
        chunk: length of a chunk along the first axis.
        student: ``function`` calls its head.
        *tensors: split along the first axis in the same way as the hidden states.
    """
    backend = student.backend
    pieces = list(zip(*(backend.split(tensor, chunk) for tensor in (student.hidden_NC, *tensors)), strict=True))
    if not torch.is_grad_enabled():
        results = [function(*piece) for piece in pieces]
    elif student.frozen_head and student.hidden_NC.requires_grad:
        return _FusedForwardBackward.apply(student.hidden_NC, function, pieces, backend.join)
    else:
        results = [backend.checkpoint(function, *piece) for piece in pieces]
    return _add_up(results)


def _add_up(results: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(sum(parts[1:], parts[0]) for parts in zip(*results, strict=True))


class _FusedForwardBackward(torch.autograd.Function):
    """A sum over chunks whose gradient is computed in the forward pass and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        function: Callable[..., tuple[Tensor, ...]],
        pieces: list[tuple[Tensor, ...]],
        join: Callable[[list[Tensor]], Tensor],
    ) -> tuple[Tensor, ...]:
        results: list[tuple[Tensor, ...]] = []
        grads: list[Tensor] = []
        for hidden, *others in pieces:
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                loss, *sums = function(leaf, *others)
                grads += torch.autograd.grad(loss, leaf)
            results.append((loss.detach(), *(value.detach() for value in sums)))
        ctx.save_for_backward(join(grads))
        totals = _add_up(results)
        ctx.mark_non_differentiable(*totals[1:])
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        (grad_NC,) = ctx.saved_tensors
        return grad_NC * grad.to(grad_NC.dtype), None, None, None
