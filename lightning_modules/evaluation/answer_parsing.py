"""Strict and lenient parsing of answers, and extraction of the ids, names and numbers that metrics compare.

Metrics count strict parses: the whole text must be one JSON object. The sys-scan-graph agent is more lenient: it reads
from the first ``{`` to the last ``}``. The share of answers that the agent could read is a metric of its own, and no
other metric includes it.

Two prompts of the agent ask for another format, which is the type of the task's schema: a JSON array, or plain text.
Such an answer is handled as an object with one key, :data:`WRAPPER_KEYS`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.tasks.schemas import closed, is_valid

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair, Schema, Task

#: type of a schema -> key under which an answer that is no object is stored
WRAPPER_KEYS = {"array": "items", "string": "text"}

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")
_OPENING = re.compile(r"[{\[]")
_WORD = re.compile(r"\w+")
_NAME = re.compile(r"/?\w[\w./:-]*")
_ID_PARTS = [re.compile(part) for part in (r"[^\W\d_]", r"\d", r"[_-]")]


@dataclass(frozen=True)
class ParsedAnswer:
    """One answer, parsed once for all metrics.

    Attributes:
        text: the text that the model generated.
        content: the variable part of the prompt.
        expected: the true answer.
        answer: the answer as a JSON object; None if the text is not in the format of the task's schema.
        extracted: the object that the agent reads, from the first ``{`` to the last ``}``; None if that is not JSON.
        valid: True if ``answer`` conforms to the task's schema.
        complete: True if the model ended the answer; False if it was cut.
        severity: severity of the pair, for figures by severity.
        category: category of the pair, for figures by category.
    """

    text: str
    content: str
    expected: dict[str, Any]
    answer: dict[str, Any] | None
    extracted: dict[str, Any] | None
    valid: bool
    complete: bool = True
    severity: str = ""
    category: str = ""


def parse_answer(task: Task, pair: Pair, text: str, complete: bool = True) -> ParsedAnswer:
    """Parses an answer to a pair of the task.

    Args:
        task: the task, whose schema the answer is validated against.
        pair: the prompt and the expected answer.
        text: the answer.
        complete: True if the model ended the answer.

    Raises:
        ValueError: the expected answer is not in the format of the task's schema.
    """
    schema = task.answer_schema
    answer = parse_as(text, schema)
    valid = answer is not None and is_valid(answer, object_schema(schema))
    expected = parse_as(pair.completion, schema)
    if expected is None:
        raise ValueError(f"the expected answer of a {pair.task} pair has no valid format: {pair.completion[:200]}")
    return ParsedAnswer(
        text=text, content=pair.content, expected=expected, answer=answer,
        extracted=parse_as(extract_json(text, schema), schema), valid=valid, complete=complete,
        severity=pair.severity, category=pair.category,
    )  # fmt: skip


def object_schema(schema: Schema) -> Schema:
    """Returns the schema of an answer as an object: the schema itself, or one with the key of :data:`WRAPPER_KEYS`."""
    key = WRAPPER_KEYS.get(schema.get("type", "object"))
    return schema if key is None else closed({key: schema})


def parse_as(text: str, schema: Schema) -> dict[str, Any] | None:
    """Parses an answer in the format of a schema.

    Args:
        text: the answer.
        schema: the task's schema, of the type object, array (a JSON array) or string (plain text).

    Returns:
        The answer as an object, see :data:`WRAPPER_KEYS`; None if the text has another format or is empty.
    """
    if schema.get("type") == "string":
        return {WRAPPER_KEYS["string"]: text} if text.strip() else None
    if schema.get("type", "object") == "object":
        return parse(text)
    try:
        value = orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return None
    return {WRAPPER_KEYS["array"]: value} if isinstance(value, list) else None


def parse(text: str) -> dict[str, Any] | None:
    """Parses a text that is one JSON object and nothing else (RFC 8259: no NaN); returns None for any other text."""
    try:
        value = orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return None
    return value if isinstance(value, dict) else None


def extract_json(text: str, schema: Schema) -> str:
    """Returns the part of an answer that the agent reads; "" if there is none.

    Args:
        text: the answer.
        schema: the task's schema: from the first ``{`` to the last ``}`` for an object, the brackets of an array, or
            the whole text if it is a string.
    """
    if schema.get("type") == "string":
        return text
    opening, closing = "[]" if schema.get("type") == "array" else "{}"
    return text[text.find(opening) : text.rfind(closing) + 1] if opening in text else ""


def as_number(value: Any) -> float | None:
    """Returns a finite JSON number as a float, and None for anything else, including a number in quotes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def strings(value: Any) -> Iterator[str]:
    """Yields every string value inside a JSON value, in order, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def named_ids(value: Any) -> Iterator[str]:
    """Yields every id inside a JSON value: strings under keys ``id``, ``ids``, or ending in ``_id`` or ``_ids``."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("id", "ids") or key.endswith(("_id", "_ids")):
                yield from strings(item)
            else:
                yield from named_ids(item)
    elif isinstance(value, list):
        for item in value:
            yield from named_ids(item)


def embedded(text: str) -> Iterator[Any]:
    """Yields every JSON object and list inside a text."""
    decoder, position = json.JSONDecoder(), 0
    while opening := _OPENING.search(text, position):
        try:
            value, position = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            position = opening.end()
        else:
            yield value


def numbers(text: str) -> list[float]:
    """Returns the separate numbers in a text: ``4444`` and ``0.5``, but not the ``2`` of ``sha256``."""
    return [float(match) for match in _NUMBER.findall(text)]


def identifiers(text: str) -> list[str]:
    """Returns the words that name one thing.

    These are paths, and words with letters, digits and a ``_`` or ``-`` (``proc_12``, ``CVE-2024-1``).
    """
    names = (match.rstrip(".:-") for match in _NAME.findall(text))
    return [name for name in names if name.startswith("/") or all(part.search(name) for part in _ID_PARTS)]


def words(texts: Sequence[str]) -> list[str]:
    """Returns the words of texts in lower case."""
    return [word for text in texts for word in _WORD.findall(text.lower())]
