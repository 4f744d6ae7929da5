"""What a model is asked and what it answers, and what may restrict an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from datamodules.tasks.base import Task


class ConstraintState(Protocol):
    """Follows one answer."""

    def accept(self, token: int) -> None:
        """Takes the answer's newest token."""


class LogitsConstraint(Protocol):
    """Says which tokens may come next, for many answers at once."""

    def start(self) -> ConstraintState:
        """Makes the matcher of one answer."""

    def allowed(self, matchers: Sequence[Any]) -> Tensor:
        """Returns int32 [B, W] on the CPU: a bit for each token that may come; all bits where there is no matcher."""

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of an answer's first tokens the grammar has."""


@dataclass(frozen=True)
class GenerationRequest:
    """What one answer is asked for.

    Attributes:
        task: whose prompt is used.
        content: the part of the prompt that differs (a finding as JSON, say).
        max_new_tokens: limit of the answer.
        constraint: restricts the answer's tokens, for instance to a grammar.
        forced_prefix: tokens that the answer begins with; the model goes on from there. Their probability is not in
            ``logprob``.
    """

    task: Task
    content: str
    max_new_tokens: int = 256
    constraint: LogitsConstraint | None = None
    forced_prefix: Sequence[int] = ()


@dataclass(frozen=True)
class GenerationOutput:
    """What the model wrote after one prompt.

    Attributes:
        text: the answer without control tokens.
        stopped: whether the model ended it; False: it ran into the token limit (or ``max_preamble_tokens``) and is cut.
        token_ids: as generated, the end-of-sequence token left out.
        logprob: natural logarithm of the answer's probability, its end-of-sequence token included.
        prompt_tokens_cut: tokens of the content that did not fit the model's positions.
    """

    text: str
    stopped: bool
    token_ids: list[int]
    logprob: float
    prompt_tokens_cut: int = 0
