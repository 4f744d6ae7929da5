"""Requests to a generation engine, its outputs, and the protocol of constraints on an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from datamodules.tasks.base import Task


class ConstraintState(Protocol):
    """State of a constraint within one output."""

    def accept(self, token: int) -> None:
        """Advances the state by the newest token of the output."""


class LogitsConstraint(Protocol):
    """Restricts which tokens may come next, for a batch of outputs at once."""

    def start(self) -> ConstraintState:
        """Returns the state at the start of an output."""

    def allowed(self, matchers: Sequence[Any]) -> Tensor:
        """Returns int32 [B, W] on the CPU: one bit per token that may come next; all bits for a matcher of None."""

    def accepts(self, tokens: Sequence[int]) -> int:
        """Returns how many of the first tokens of an output the constraint allows."""


@dataclass(frozen=True)
class GenerationRequest:
    """A request for one output.

    Attributes:
        task: the task whose prompt is used.
        content: the variable part of the prompt, for instance a finding as JSON.
        max_new_tokens: largest number of tokens of the output.
        constraint: restricts the tokens of the output, for instance to a grammar.
        forced_prefix: tokens that the output begins with; the model continues them. Their probability is not part of
            ``GenerationOutput.logprob``.
        prompt_ids: token ids of the whole prompt, if the caller has encoded it already. The engine encodes it if None.
    """

    task: Task
    content: str
    max_new_tokens: int = 256
    constraint: LogitsConstraint | None = None
    forced_prefix: Sequence[int] = ()
    prompt_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class GenerationOutput:
    """The output that a model generated for one request.

    Attributes:
        text: the output without control tokens.
        stopped: True if the model ended the output; False if it was cut at the token limit (or at
            ``should_stop``).
        token_ids: the generated tokens, without the end-of-sequence token.
        logprob: natural logarithm of the output's probability, including its end-of-sequence token.
        prompt_tokens_cut: tokens of the content that did not fit the model's positions.
    """

    text: str
    stopped: bool
    token_ids: list[int]
    logprob: float
    prompt_tokens_cut: int = 0
