"""Constrained decoding: a grammar compiled from a JSON Schema masks the logits of each step.

The grammar engine is llguidance (Microsoft, MIT licence; ``pip install llguidance``), imported at first use. An output
that the model ends is always valid under the schema. An output that reaches the token limit is cut, and
``GenerationOutput.stopped`` is False. The mask costs about 50 us per row and step on the host for a vocabulary of
49,152 tokens; the masks of a batch are computed in parallel.
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
    """Grammar of one JSON schema; a :class:`~lightning_modules.generation.requests.LogitsConstraint`.

    As in training, the JSON is compact, its keys have the order of the schema, and numbers have at most two decimals. A
    model that degenerates therefore can't fill its answer with spaces or digits. One space is allowed before the JSON,
    because a SentencePiece model has learned to write one there.

    Args:
        tokenizer: the model's fast Hugging Face tokenizer.
        eos_id: id of the token that ends an answer (``ChatFormat.eos_id``).
        schema: JSON Schema of the answers.

    Raises:
        UserError: llguidance is not installed.
        ValueError: the schema contains something that the grammar can't express.
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
        """Returns the state at the start of an answer; the compiled grammar is shared."""
        return GrammarState(self._matcher.deep_copy())

    def allowed(self, matchers: Sequence[GrammarState | None]) -> Tensor:
        """Returns int32 [B, W]: one bit per token that may come next; all bits are set for a matcher of None."""
        words = -(-self._tokenizer.vocab_size // 32)
        bits_BW = torch.full((len(matchers), words), -1, dtype=torch.int32)
        rows = [(item.matcher, row) for row, item in enumerate(matchers) if item is not None]
        self._executor.unsafe_compute_mask_ptr(rows, bits_BW.data_ptr(), words * 4, len(matchers))
        return bits_BW

    def accepts(self, tokens: Sequence[int]) -> int:
        """Returns how many of an answer's first tokens the grammar allows."""
        count: int = self._matcher.deep_copy().validate_tokens(list(tokens))
        return count


class GrammarState:
    """Position of one answer within the grammar.

    Args:
        matcher: an llguidance matcher at the start of the answer.
    """

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def accept(self, token: int) -> None:
        """Advances the state by the newest token.

        Raises:
            ValueError: the grammar does not allow the token here.
        """
        if not self.matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here: {self.matcher.get_error()}")


@lru_cache(maxsize=2)
def _read_tokenizer(tokenizer: Any, eos_id: int) -> Any:
    """Returns the vocabulary in llguidance's format. It takes about one second, and all tasks of a model share it."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, eos_token=eos_id)


def _two_decimals(schema: Any) -> Any:
    """Returns a copy of a schema in which every number is a multiple of 0.01."""
    if isinstance(schema, list):
        return [_two_decimals(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: _two_decimals(value) for key, value in schema.items()}
    return copy | {"multipleOf": 0.01} if schema.get("type") == "number" else copy
