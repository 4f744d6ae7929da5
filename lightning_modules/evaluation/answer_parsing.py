"""An answer beside what was expected: strict and lenient parsing, and what its parts say.

Strict is what is counted: the whole text must be one JSON object. The sys-scan-graph agent is more lenient, it cuts
from the first ``{`` to the last ``}``; how many answers that would save is reported beside it, never mixed in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.tasks.schemas import is_valid

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair, Task

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")
_OPENING = re.compile(r"[{\[]")
_WORD = re.compile(r"\w+")
_NAME = re.compile(r"/?\w[\w./:-]*")
_ID_PARTS = [re.compile(part) for part in (r"[^\W\d_]", r"\d", r"[_-]")]


@dataclass(frozen=True)
class ParsedAnswer:
    """One answer, read once for all metrics.

    Attributes:
        text: what the model wrote.
        content: the prompt's own part.
        expected: the true answer.
        answer: the answer as a JSON object; None where the text is not exactly one.
        cut: what the agent makes of it: the object between the first ``{`` and the last ``}``, or None.
        valid: whether ``answer`` conforms to the task's schema.
        complete: whether the model ended it itself.
        severity: class of the pair, for shares by severity.
        category: class of the pair, for shares by category.
    """

    text: str
    content: str
    expected: dict[str, Any]
    answer: dict[str, Any] | None
    cut: dict[str, Any] | None
    valid: bool
    complete: bool = True
    severity: str = ""
    category: str = ""


def parse_answer(task: Task, pair: Pair, text: str, complete: bool = True) -> ParsedAnswer:
    """Reads an answer to a pair of the task."""
    answer = parse(text)
    valid = answer is not None and is_valid(answer, task.answer_schema)
    expected = parse(pair.completion)
    if expected is None:
        raise ValueError(f"the expected answer of a {pair.task} pair is no JSON object: {pair.completion[:200]}")
    return ParsedAnswer(
        text=text, content=pair.content, expected=expected, answer=answer, cut=parse(cut_out(text)), valid=valid,
        complete=complete, severity=pair.severity, category=pair.category,
    )  # fmt: skip


def parse(text: str) -> dict[str, Any] | None:
    """Reads a text that is one JSON object and nothing else (RFC 8259: no NaN); None otherwise."""
    try:
        value = orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return None
    return value if isinstance(value, dict) else None


def cut_out(text: str) -> str:
    """The agent's way: from the first ``{`` to the last ``}``; "" where there is no such part."""
    return text[text.find("{") : text.rfind("}") + 1] if "{" in text else ""


def as_number(value: Any) -> float | None:
    """A finite JSON number as a float; None for anything else, a number in quotes included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def strings(value: Any) -> Iterator[str]:
    """Every string value inside a JSON value, in order; keys are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def named_ids(value: Any) -> Iterator[str]:
    """Every id inside a JSON value: strings under keys ``id``, ``ids``, or ending in ``_id`` or ``_ids``."""
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
    """Every JSON object and list in a text, whatever is written around them."""
    decoder, position = json.JSONDecoder(), 0
    while opening := _OPENING.search(text, position):
        try:
            value, position = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            position = opening.end()
        else:
            yield value


def numbers(text: str) -> list[float]:
    """The numbers in a text that stand alone: ``4444`` and ``0.5``, not the ``2`` of ``sha256``."""
    return [float(match) for match in _NUMBER.findall(text)]


def identifiers(text: str) -> list[str]:
    """Words that name one thing: a path, or letters and digits about a ``_`` or ``-`` (``proc_12``, ``CVE-2024-1``)."""
    found = (match.rstrip(".:-") for match in _NAME.findall(text))
    return [name for name in found if name.startswith("/") or all(part.search(name) for part in _ID_PARTS)]


def words(texts: Sequence[str]) -> list[str]:
    """Lower-case words."""
    return [word for text in texts for word in _WORD.findall(text.lower())]
