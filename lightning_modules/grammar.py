"""Answers that can't break their schema: a grammar compiled from JSON Schema masks the tokens of each step.

Done by llguidance (Microsoft, MIT licence; ``pip install llguidance``), imported where it is used. An answer that ends
by itself always validates; one that runs into the token limit is cut and says so (``Answer.stopped``). The cost is some
50 us a row and step on the host, for the mask of a 49,152-word vocabulary.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import UserError

if TYPE_CHECKING:
    from datamodules.tasks.prompts import Schema


class JsonGrammar:
    """Makes matchers for one schema; a :data:`~lightning_modules.generation.Constraint`.

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
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise UserError("constrained generation needs llguidance; run `pip install llguidance`") from error
        text = json.dumps(_two_decimals(schema) | {"x-guidance": {"whitespace_flexible": False}})
        self._grammar = llguidance.LLMatcher.grammar_from_lark(f'start: LEAD? answer\nLEAD: " "\nanswer: %json {text}')
        self._tokenizer = from_tokenizer(tokenizer, eos_token=eos_id)
        self._matcher = llguidance.LLMatcher(self._tokenizer, self._grammar)
        if self._matcher.is_error():
            raise ValueError(f"the schema can't be compiled to a grammar: {self._matcher.get_error()}")

    def __call__(self) -> GrammarMatcher:
        """Makes the matcher of one answer, from the grammar compiled before."""
        return GrammarMatcher(self._matcher.deep_copy(), self._tokenizer.vocab_size)


class GrammarMatcher:
    """Follows one answer through the grammar.

    Args:
        matcher: of llguidance, at the answer's start.
        vocabulary: V, number of token ids.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def __call__(self, token: int | None) -> Tensor:
        """Takes the newest token and returns which may come next, bool [V].

        Raises:
            ValueError: the token was not among those allowed.
        """
        if token is not None and not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here: {self._matcher.get_error()}")
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self._vocabulary, bitorder="little")).bool()


def _two_decimals(schema: Any) -> Any:
    """A copy of a schema in which every number is a multiple of 0.01."""
    if isinstance(schema, list):
        return [_two_decimals(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: _two_decimals(value) for key, value in schema.items()}
    return copy | {"multipleOf": 0.01} if schema.get("type") == "number" else copy
