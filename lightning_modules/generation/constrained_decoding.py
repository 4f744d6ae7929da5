"""Answers that can't break their schema: a grammar compiled from JSON Schema masks the tokens of each step.

Done by llguidance (Microsoft, MIT licence; ``pip install llguidance``), imported where it is used. An answer that ends
by itself always validates; one that runs into the token limit is cut and says so (``GenerationOutput.stopped``). The
cost is some 50 us a row and step on the host, for the mask of a 49,152-word vocabulary; rows are masked in parallel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.errors import UserError

if TYPE_CHECKING:
    from datamodules.tasks.base import Schema


class JsonGrammar:
    """Makes matchers for one schema; a :class:`~lightning_modules.generation.engine.LogitsConstraint`.

    The JSON is compact, its keys stand in the schema's order, numbers have at most two decimals, as in training: a
    model that drifts can't fill its answer with spaces or digits. A space may stand before it, since a SentencePiece
    model was taught one there.

    Args:
        tokenizer: the model's fast Hugging Face tokenizer.
        eos_id: the token that ends an answer (``ChatFormat.eos_id``).
        schema: what answers must conform to.

    Raises:
        UserError: llguidance is not installed.
        ValueError: the schema uses what the grammar can't express.
    """

    def __init__(self, tokenizer: Any, eos_id: int, schema: Schema) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise UserError("constrained generation needs llguidance; run `pip install llguidance`") from error
        text = json.dumps(_two_decimals(schema) | {"x-guidance": {"whitespace_flexible": False}})
        self._grammar = llguidance.LLMatcher.grammar_from_lark(f'start: LEAD? answer\nLEAD: " "\nanswer: %json {text}')
        self._tokenizer = _read_tokenizer(tokenizer, eos_id)
        self._matcher = llguidance.LLMatcher(self._tokenizer, self._grammar)
        self._executor = llguidance.LLExecutor()
        self.eos_id = eos_id
        if self._matcher.is_error():
            raise ValueError(f"the schema can't be compiled to a grammar: {self._matcher.get_error()}")

    def start(self) -> GrammarState:
        """Makes the matcher of one answer, from the grammar compiled before."""
        return GrammarState(self._matcher.deep_copy())

    def allowed(self, matchers: Sequence[GrammarState | None]) -> Tensor:
        """Returns int32 [B, W]: a bit for each token that may come next; all bits where there is no matcher."""
        words = -(-self._tokenizer.vocab_size // 32)
        bits_BW = torch.full((len(matchers), words), -1, dtype=torch.int32)
        waiting = [(item.matcher, row) for row, item in enumerate(matchers) if item is not None]
        self._executor.unsafe_compute_mask_ptr(waiting, bits_BW.data_ptr(), words * 4, len(matchers))
        return bits_BW

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of an answer's first tokens the grammar has."""
        count: int = self._matcher.deep_copy().validate_tokens(list(tokens))
        return count


class GrammarState:
    """Follows one answer through the grammar.

    Args:
        matcher: of llguidance, at the answer's start.
    """

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def accept(self, token: int) -> None:
        """Takes the newest token.

        Raises:
            ValueError: it was not among those allowed.
        """
        if not self.matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here: {self.matcher.get_error()}")


@lru_cache(maxsize=2)
def _read_tokenizer(tokenizer: Any, eos_id: int) -> Any:
    """The vocabulary as llguidance wants it: a second's work that all tasks of a model share."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, eos_token=eos_id)


def _two_decimals(schema: Any) -> Any:
    """A copy of a schema in which every number is a multiple of 0.01."""
    if isinstance(schema, list):
        return [_two_decimals(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: _two_decimals(value) for key, value in schema.items()}
    return copy | {"multipleOf": 0.01} if schema.get("type") == "number" else copy
