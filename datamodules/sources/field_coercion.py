"""Reads the fields of a record; repairs and counts a wrong value if its meaning is clear.

Each function takes the value of the file and ``repairs``, the counts of repairs by name, to which it adds. The names
are listed in :mod:`datamodules.sources.record_validation`.
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

SEVERITY_ALIASES = {
    "informational": "info", "information": "info", "notice": "info", "minor": "low", "moderate": "medium",
    "med": "medium", "warning": "medium", "warn": "medium", "major": "high", "important": "high", "severe": "high",
    "crit": "critical", "emergency": "critical", "fatal": "critical",
}  # fmt: skip
#: names in scanners and in the report schema -> categories of the corpus
CATEGORY_ALIASES = {
    "process": "processes", "network_socket": "network", "kernel_param": "kernel_params", "kernel_module": "modules",
    "module": "modules", "suid_sgid": "suid",
}  # fmt: skip
#: the scanner's usual score for a severity, and the lowest score of each band (the shards: info 10, low 25-30, medium
#: 45-50, high 70-80, critical 90-95)
DEFAULT_SCORES = {"info": 10.0, "low": 30.0, "medium": 50.0, "high": 80.0, "critical": 90.0}
SEVERITY_BANDS = ((90.0, "critical"), (70.0, "high"), (40.0, "medium"), (20.0, "low"), (-math.inf, "info"))
ENRICHMENT_LISTS = ("mitigation_steps", "attack_vectors", "compliance_impact")
ENRICHMENT_TEXTS = ("business_impact", "technical_details")

SEVERITY_SET, CATEGORY_SET, BASELINE_SET = frozenset(SEVERITIES), frozenset(CATEGORIES), frozenset(BASELINE_STATUSES)


class InvalidRecord(Exception):
    """A record, or the bytes of a document, that can't be used.

    Args:
        reason: a short identifier by which such records are counted.
        detail: the exact problem, as text for people.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def number(value: Any, name: str, repairs: Counter[str]) -> float | None:
    """Reads a number, also from a string.

    Args:
        value: the value of the file.
        name: the field's name, for the error.
        repairs: counts of repairs by name; added to.

    Returns:
        The number; None for null, an empty string or an unreadable value.

    Raises:
        InvalidRecord: the number is NaN or infinite.
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
    """Reads a list of strings.

    A string is split at its commas, numbers in a list become text, and items of other types are dropped.
    """
    if value is None:
        repairs[f"null_{name}"] += 1
        return []
    if isinstance(value, str):
        repairs["list_from_string"] += 1
        return [stripped for part in value.split(",") if (stripped := part.strip())]
    if not isinstance(value, list | tuple):
        repairs["list_item_dropped"] += 1
        return []
    try:
        "".join(value)  # the fastest check that all items are strings
    except TypeError:
        pass
    else:
        return list(value)
    kept = [str(item) for item in value if isinstance(item, str | int | float)]
    repairs["text_from_number"] += sum(not isinstance(item, str) for item in value) - (len(value) - len(kept))
    repairs["list_item_dropped"] += len(value) - len(kept)
    return kept


def texts(record: dict[str, Any], repairs: Counter[str]) -> tuple[str, str]:
    """Reads title and description; a missing title is taken from the description.

    Raises:
        InvalidRecord: the record has neither.
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
    """Reads text; a number becomes text, and any other value counts as null."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        repairs["text_from_number"] += 1
        return str(value)
    repairs[f"null_{name}"] += 1
    return ""


def severity_and_scores(
    record: dict[str, Any], default_severity: str, repairs: Counter[str]
) -> tuple[str, float, float]:
    """Reads severity, risk score and base score; a missing one is derived from the others.

    Args:
        record: the JSON object. Its floats must be finite, as :func:`~datamodules.sources.decompression.loads` and
            :func:`~datamodules.sources.decompression.strict_json_error` ensure.
        default_severity: severity of the list that contains the record, for a record without one; "" if unknown.
        repairs: counts of repairs by name; added to.

    Returns:
        One of :data:`~datamodules.records.SEVERITIES`, the risk score and the base score, both in 0..100.

    Raises:
        InvalidRecord: all three are missing, or a score in a string or an integer is not finite.
    """
    severity, score, base = record.get("severity"), record.get("risk_score"), record.get("base_severity_score")
    if type(score) is not float:
        score = number(score, "risk_score", repairs)
    if type(base) is not float:
        base = number(base, "base_severity_score", repairs)
    if type(severity) is not str or severity not in SEVERITY_SET:
        severity = severity_word(severity, repairs) or severity_word(default_severity, repairs)
    if severity is None and score is None and base is None:
        raise InvalidRecord("no_severity_or_score", repr(record.get("severity"))[:80])
    if score is None:
        repairs["risk_score_from_base" if base is not None else "score_from_severity"] += 1
        score = base if base is not None else DEFAULT_SCORES[severity or "info"]
    if base is None:
        repairs["base_from_risk_score"] += 1
        base = score
    if not (0.0 <= score <= 100.0 and 0.0 <= base <= 100.0):
        score, base = clamped_score(score, repairs), clamped_score(base, repairs)
    if severity is None:
        repairs["severity_from_score"] += 1
        severity = next(word for floor, word in SEVERITY_BANDS if score >= floor)
    return severity, score, base


def severity_word(value: Any, repairs: Counter[str]) -> str | None:
    """Reads a severity in any case, also one of :data:`SEVERITY_ALIASES`; None if the value is not a severity."""
    word = value.strip().lower() if isinstance(value, str) else ""
    word = SEVERITY_ALIASES.get(word, word)
    if word not in SEVERITY_SET:
        return None
    if word != value:
        repairs["severity_alias"] += 1
    return word


def category(value: Any, default: str, repairs: Counter[str]) -> str:
    """Reads a category; an unknown one is kept.

    Args:
        value: the value of the file.
        default: category of the list that contains the record, for a record without one; "" if unknown.
        repairs: counts of repairs by name; added to.
    """
    word = value.strip().lower() if isinstance(value, str) else ""
    if not word:
        word = default.strip().lower()
        repairs["category_missing"] += not word
    if word in CATEGORY_ALIASES:
        repairs["category_alias"] += 1
        return CATEGORY_ALIASES[word]
    if word and word not in CATEGORY_SET:
        repairs["unknown_category"] += 1
    return word or "unknown"


def baseline(value: Any, repairs: Counter[str]) -> str:
    """Reads a baseline status; "unknown" if the value is not one of them."""
    if value is None or value == "":
        return "unknown"
    word = value.strip().lower() if isinstance(value, str) else ""
    repairs["unknown_baseline"] += word not in BASELINE_SET
    return word if word in BASELINE_SET else "unknown"


def metadata(record: dict[str, Any], repairs: Counter[str]) -> dict[str, Any]:
    """Reads a record's metadata; JSON text is parsed, and a value that is not an object is wrapped in one."""
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
    """Reads the risk subscores of the record, each clamped to 0..1; missing ones stay missing."""
    if not isinstance(value, dict):
        repairs["unreadable_number"] += 1
        return {}
    scores = {}
    for name in SUBSCORES:
        score = value.get(name)
        if type(score) is not float or not 0.0 <= score <= 1.0:
            score = fraction(score, name, repairs)
        if score is not None:
            scores[name] = score
    return scores


def fraction(value: Any, name: str, repairs: Counter[str]) -> float | None:
    """Reads a number and clamps it to 0..1; None if there is none.

    Raises:
        InvalidRecord: the number is NaN or infinite.
    """
    result = number(value, name, repairs)
    if result is None or 0.0 <= result <= 1.0:
        return result
    repairs["subscore_clamped"] += 1
    return min(max(result, 0.0), 1.0)


def clamped_score(score: float, repairs: Counter[str]) -> float:
    """Clamps a score to 0..100."""
    if 0.0 <= score <= 100.0:
        return score
    repairs["score_clamped"] += 1
    return min(max(score, 0.0), 100.0)


def rationale(value: Any, repairs: Counter[str]) -> list[str]:
    """Reads a rationale: a string or a list of strings."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return strings(value, "rationale", repairs)
    repairs["rationale_dropped"] += 1
    return []


def enrichment(value: Any, repairs: Counter[str]) -> dict[str, Any]:
    """Reads the archive's LangChain fields; empty if the enrichment failed ({"error", "fallback": true})."""
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
    """Builds an id for a record without a usable one.

    Args:
        value: the id of the file; a number becomes text.
        kind: first part of a built id, "finding" or "correlation".
        content: the values whose digest is the second part, so that the same record always gets the same id.
        repairs: counts of repairs by name; added to.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        repairs["text_from_number"] += 1
        return str(value)
    repairs["id_from_content"] += 1
    blob = json.dumps(content, default=str, sort_keys=True)  # unlike orjson it takes integers of any size
    return f"{kind}_{blake2b(blob.encode(), digest_size=8).hexdigest()}"
