"""The fields of a record: read where they are right, repaired and counted where the meaning is clear.

Each function gets the value as it stands in the file and ``repairs``, the counts by name that it adds to.
"""

from __future__ import annotations

import json
import math
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.records import BASELINE_STATUSES, CATEGORIES, SEVERITIES, SUBSCORES

if TYPE_CHECKING:
    from collections import Counter

MAX_DEPTH = 64  #: nesting of a record's free fields; real ones have 2
MAX_CHARACTERS = 1 << 20  #: text of one record; a prompt holds a few thousand

ALIASES = {
    "informational": "info", "information": "info", "notice": "info", "minor": "low", "moderate": "medium",
    "med": "medium", "warning": "medium", "warn": "medium", "major": "high", "important": "high", "severe": "high",
    "crit": "critical", "emergency": "critical", "fatal": "critical",
}  # fmt: skip
#: names that scanners and the report schema give to the corpus' categories
CATEGORY_ALIASES = {
    "process": "processes", "network_socket": "network", "kernel_param": "kernel_params", "kernel_module": "modules",
    "module": "modules", "suid_sgid": "suid",
}  # fmt: skip
#: the scanner's usual score for a severity, and the lowest score of each band (the shards: info 10, low 25-30, medium
#: 45-50, high 70-80, critical 90-95)
SCORES = {"info": 10.0, "low": 30.0, "medium": 50.0, "high": 80.0, "critical": 90.0}
BANDS = ((90.0, "critical"), (70.0, "high"), (40.0, "medium"), (20.0, "low"), (-math.inf, "info"))
ENRICHMENT_LISTS = ("mitigation_steps", "attack_vectors", "compliance_impact")
ENRICHMENT_TEXTS = ("business_impact", "technical_details")

SEVERITY_SET, CATEGORY_SET, BASELINE_SET = frozenset(SEVERITIES), frozenset(CATEGORIES), frozenset(BASELINE_STATUSES)


class InvalidRecord(Exception):
    """A record that can't be used.

    Args:
        reason: a slug to count by.
        detail: what exactly, for people.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class DuplicateKeys(dict[str, Any]):
    """A JSON object in which a key stood twice: nobody can say which value was meant."""


def number(value: Any, name: str, repairs: Counter[str]) -> float | None:
    """Reads a number, also from a string; None where there is none or it can't be read.

    Raises:
        Refused: NaN or infinite.
    """
    kind = type(value)
    if kind is not float and kind is not int:
        if value is None or value == "":
            return None
        if kind is not str:
            repairs["unreadable_number"] += 1
            return None
        try:
            value = float(value)
        except ValueError:
            repairs["unreadable_number"] += 1
            return None
        repairs["number_from_string"] += 1
    try:
        result = float(value)
    except OverflowError:  # an integer of more than 308 digits
        result = math.inf
    if not math.isfinite(result):
        raise InvalidRecord("non_finite", name)
    return result


def strings(value: Any, name: str, repairs: Counter[str]) -> list[str]:
    """Reads a list of strings; a string becomes a list at its commas, numbers become text, other items are dropped."""
    if value is None:
        repairs[f"null_{name}"] += 1
        return []
    if isinstance(value, str):
        repairs["list_from_string"] += 1
        return [part for piece in value.split(",") if (part := piece.strip())]
    if not isinstance(value, list | tuple):
        repairs["list_item_dropped"] += 1
        return []
    try:
        "".join(value)  # the fastest way to ask whether all are strings
    except TypeError:
        pass
    else:
        return list(value)
    kept = [str(item) for item in value if isinstance(item, str | int | float)]
    repairs["text_from_number"] += sum(not isinstance(item, str) for item in value) - (len(value) - len(kept))
    repairs["list_item_dropped"] += len(value) - len(kept)
    return kept


def measure(fields: dict[str, Any]) -> int:
    """Counts the characters in free fields.

    Raises:
        Refused: nested deeper than :data:`MAX_DEPTH`.
    """
    characters, nested = len("".join(fields)), []
    for item in fields.values():
        kind = type(item)
        if kind is str:
            characters += len(item)
        elif kind is dict or kind is list or kind is DuplicateKeys:
            nested.append((item, 2))
    while nested:
        value, depth = nested.pop()
        if depth > MAX_DEPTH:
            raise InvalidRecord("too_deep", f"more than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            characters += len("".join(value))
            value = value.values()
        for item in value:
            if type(item) is str:
                characters += len(item)
            elif isinstance(item, dict | list):
                nested.append((item, depth + 1))
    return characters


def strict_json_error(record: Any) -> tuple[str, str] | None:
    """Says what strict JSON would have refused in a record that a tolerant parser read, as (reason, detail)."""
    stack = [(record, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            return "too_deep", f"more than {MAX_DEPTH} levels"
        if isinstance(value, DuplicateKeys):
            return "duplicate_keys", ""
        if isinstance(value, dict):
            stack.extend((item, depth + 1) for pair in value.items() for item in pair)
        elif isinstance(value, list):
            stack.extend((item, depth + 1) for item in value)
        elif isinstance(value, float) and not math.isfinite(value):
            return "non_finite", str(value)
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            return "invalid_utf8", ""
    return None


def texts(record: dict[str, Any], repairs: Counter[str]) -> tuple[str, str]:
    """Reads title and description, the title from the description where it is missing.

    Raises:
        Refused: neither is there.
    """
    title, description = record.get("title"), record.get("description")
    if type(title) is str and title and type(description) is str:
        return title, description
    title, description = plain_text(title, "title", repairs), plain_text(description, "description", repairs)
    if not title:
        if not description:
            raise InvalidRecord("no_text", "neither title nor description")
        repairs["title_from_description"] += 1
        title = description[:80]
    return title, description


def plain_text(value: Any, name: str, repairs: Counter[str]) -> str:
    """Reads text; numbers become text, anything else is as good as null."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        repairs["text_from_number"] += 1
        return str(value)
    repairs[f"null_{name}"] += 1
    return ""


def grade(record: dict[str, Any], bucket: str, repairs: Counter[str]) -> tuple[str, float, float]:
    """Severity, risk score and base score, each from the others where it is missing."""
    severity, score, base = record.get("severity"), record.get("risk_score"), record.get("base_severity_score")
    if type(score) is not float:
        score = number(score, "risk_score", repairs)
    if type(base) is not float:
        base = number(base, "base_severity_score", repairs)
    if type(severity) is not str or severity not in SEVERITY_SET:
        severity = severity_word(severity, repairs) or severity_word(bucket, repairs)
    if severity is None and score is None and base is None:
        raise InvalidRecord("no_severity_or_score", repr(record.get("severity"))[:80])
    if score is None:
        repairs["risk_score_from_base" if base is not None else "score_from_severity"] += 1
        score = base if base is not None else SCORES[severity or "info"]
    if base is None:
        repairs["base_from_risk_score"] += 1
        base = score
    if not (0.0 <= score <= 100.0 and 0.0 <= base <= 100.0):
        score, base = clamped(score, repairs), clamped(base, repairs)
    if severity is None:
        repairs["severity_from_score"] += 1
        severity = next(word for floor, word in BANDS if score >= floor)
    return severity, score, base


def severity_word(value: Any, repairs: Counter[str]) -> str | None:
    """Reads a severity, in any case and under its common other names; None where it is none."""
    word = value.strip().lower() if isinstance(value, str) else ""
    word = ALIASES.get(word, word)
    if word not in SEVERITY_SET:
        return None
    if word != value:
        repairs["severity_alias"] += 1
    return word


def category(value: Any, bucket: str, repairs: Counter[str]) -> str:
    """Reads a category, kept where unknown; ``bucket`` is that of the list around the record."""
    word = value.strip().lower() if isinstance(value, str) else ""
    if not word:
        word = bucket.strip().lower()
        repairs["category_missing"] += not word
    if word in CATEGORY_ALIASES:
        repairs["category_alias"] += 1
        return CATEGORY_ALIASES[word]
    if word and word not in CATEGORY_SET:
        repairs["unknown_category"] += 1
    return word or "unknown"


def baseline(value: Any, repairs: Counter[str]) -> str:
    """Reads a baseline status; "unknown" where the word is none."""
    if value is None or value == "":
        return "unknown"
    word = value.strip().lower() if isinstance(value, str) else ""
    repairs["unknown_baseline"] += word not in BASELINE_SET
    return word if word in BASELINE_SET else "unknown"


def metadata(record: dict[str, Any], repairs: Counter[str]) -> dict[str, Any]:
    """Free fields that are no plain object: null, JSON text, an ambiguous object or a bare value."""
    value = record.get("metadata")
    if isinstance(value, dict):
        return value
    if value is None:
        repairs["null_metadata"] += 1
        return {}
    if isinstance(value, str):
        try:
            parsed = orjson.loads(value)
        except orjson.JSONDecodeError:
            parsed = None
        if isinstance(parsed, dict):
            repairs["metadata_from_string"] += 1
            return parsed
        if not value:
            return {}
    repairs["metadata_wrapped"] += 1
    return {"value": value}


def subscores(value: Any, repairs: Counter[str]) -> dict[str, float]:
    """Reads the risk subscores that are there, each brought into 0..1."""
    if not isinstance(value, dict):
        repairs["unreadable_number"] += 1
        return {}
    scores = {}
    for name in SUBSCORES:
        score = value.get(name)
        if type(score) is not float or not 0.0 <= score <= 1.0:
            score = share(score, name, repairs)
        if score is not None:
            scores[name] = score
    return scores


def share(value: Any, name: str, repairs: Counter[str]) -> float | None:
    """Reads a number brought into 0..1; None where there is none."""
    part = number(value, name, repairs)
    if part is None or 0.0 <= part <= 1.0:
        return part
    repairs["subscore_clamped"] += 1
    return min(max(part, 0.0), 1.0)


def clamped(score: float, repairs: Counter[str]) -> float:
    """Brings a score into 0..100."""
    if 0.0 <= score <= 100.0:
        return score
    repairs["score_clamped"] += 1
    return min(max(score, 0.0), 100.0)


def rationale(value: Any, repairs: Counter[str]) -> list[str]:
    """Reads a rationale, a string or a list of strings."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return strings(value, "rationale", repairs)
    repairs["rationale_dropped"] += 1
    return []


def enrichment(value: Any, repairs: Counter[str]) -> dict[str, Any]:
    """The archive's LangChain fields; nothing where the enrichment failed ({"error", "fallback": true})."""
    if not isinstance(value, dict) or "error" in value or value.get("fallback"):
        return {}
    fields: dict[str, Any] = {}
    for name in ENRICHMENT_LISTS:
        item = value.get(name)
        steps = [item] if isinstance(item, str) else strings(item, name, repairs) if isinstance(item, list) else []
        if kept := [step for step in steps if step.strip()]:
            fields[name] = kept
    for name in ENRICHMENT_TEXTS:
        if isinstance(value.get(name), str) and value[name].strip():
            fields[name] = value[name]
    return fields


def identity(value: Any, kind: str, content: Any, repairs: Counter[str]) -> str:
    """Makes an id: a number as text, or a digest of the content, so that the same record always gets the same."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        repairs["text_from_number"] += 1
        return str(value)
    repairs["id_from_content"] += 1
    blob = json.dumps(content, default=str, sort_keys=True)  # it takes integers of any size
    return f"{kind}_{blake2b(blob.encode(), digest_size=8).hexdigest()}"
