"""Validates one record: repairs and counts clear errors, and rejects other invalid records with a reason.

A record is a JSON object of a file. An error of real files that can be repaired without guessing is repaired (and
counted by name in ``repairs``); if a repair would lose meaning, :class:`InvalidRecord` gives the reason. The functions
run once per finding of the whole corpus: the valid case of each field is tested first and costs one type check.

Repairs, by name: ``number_from_string``, ``unreadable_number``, ``risk_score_from_base``, ``base_from_risk_score``,
``score_from_severity``, ``severity_alias``, ``severity_from_score``, ``score_clamped``, ``subscore_clamped``,
``unknown_category``, ``category_alias``, ``category_missing``, ``title_from_description``, ``id_from_content``,
``text_from_number``, ``unknown_baseline``, ``list_from_string``, ``list_item_dropped``, ``metadata_from_string``,
``metadata_wrapped``, ``rationale_dropped``, and ``null_<field>`` for a null in a field that needs a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.records import Correlation, Finding
from datamodules.sources import field_coercion
from datamodules.sources.decompression import DuplicateKeys, loads
from datamodules.sources.field_coercion import MAX_CHARACTERS, MAX_DEPTH, InvalidRecord, number, strings

if TYPE_CHECKING:
    from collections import Counter

#: fields that a flattened table stores as JSON text, and the first character of that text
_JSON_TEXT = dict.fromkeys(("metadata", "risk_subscores", "_langchain_enrichment"), "{") | dict.fromkeys(
    ("tags", "correlation_refs", "related_finding_ids", "rationale"), "["
)


def read_finding(record: Any, repairs: Counter[str], category: str = "", severity: str = "") -> Finding:
    """Converts a record to a finding.

    Args:
        record: the JSON value.
        repairs: counts of repairs by name; added to.
        category: category of the list that contains the record, for a record without one; "" if unknown.
        severity: severity of that list, for a record without one; "" if unknown.

    Raises:
        InvalidRecord: the record is not an object, has no text, has neither severity nor score, holds a number that is
            not finite, is nested too deep, or is too large.
    """
    if not isinstance(record, dict):
        raise InvalidRecord("not_an_object", type(record).__name__)
    get = record.get
    title, description = field_coercion.texts(record, repairs)
    metadata = get("metadata")
    if type(metadata) is not dict:
        metadata = field_coercion.metadata(record, repairs)
    size = len(title) + len(description) + (count_characters(metadata) if metadata else 0)
    word, score, base = field_coercion.severity_and_scores(record, severity, repairs)
    kind = get("category")
    if type(kind) is not str or kind not in field_coercion.CATEGORY_SET:
        kind = field_coercion.category(kind, category, repairs)
    baseline = get("baseline_status")
    if type(baseline) is not str or baseline not in field_coercion.BASELINE_SET:
        baseline = field_coercion.baseline(baseline, repairs)
    probability = get("probability_actionable")
    if type(probability) is not float or not 0.0 <= probability <= 1.0:
        probability = field_coercion.fraction(probability, "probability_actionable", repairs)
    identity = get("id")
    if type(identity) is not str or not identity:
        identity = field_coercion.identity(identity, "finding", (kind, title, description, metadata), repairs)
    tags, rationale, refs = get("tags"), get("rationale"), get("correlation_refs")
    subscores, enrichment = get("risk_subscores"), get("_langchain_enrichment")
    tags = strings(tags, "tags", repairs) if tags or tags is None else []
    rationale = field_coercion.rationale(rationale, repairs) if rationale else []
    refs = strings(refs, "correlation_refs", repairs) if refs else []
    enrichment = field_coercion.enrichment(enrichment, repairs) if enrichment else {}
    size += len(kind) + len(identity) + len("".join(tags))
    if rationale or refs or enrichment:
        size += len("".join(rationale)) + len("".join(refs)) + count_characters(enrichment)
    if size > MAX_CHARACTERS:
        raise InvalidRecord("too_large", f"more than {MAX_CHARACTERS} characters of text")
    return Finding(
        identity,
        title,
        description,
        kind,
        word,
        score,
        base,
        metadata,
        tags,
        field_coercion.subscores(subscores, repairs) if subscores else {},
        probability,
        baseline,
        rationale,
        refs,
        enrichment,
    )


def read_correlation(record: Any, repairs: Counter[str]) -> Correlation:
    """Converts a record to a correlation.

    The ids of its findings are in ``related_finding_ids`` (``ground_truth_v1``) or ``correlation_refs`` (batches).

    Args:
        record: the JSON value.
        repairs: counts of repairs by name; added to.

    Raises:
        InvalidRecord: the record is not an object, has no text, holds a number that is not finite, is nested too deep,
            or is too large.
    """
    if not isinstance(record, dict):
        raise InvalidRecord("not_an_object", type(record).__name__)
    get = record.get
    rationale = get("rationale")
    explanation = get("description") or " ".join(field_coercion.rationale(rationale, repairs) if rationale else [])
    title, description = field_coercion.texts({"title": get("title"), "description": explanation}, repairs)
    metadata = get("metadata", {})
    if type(metadata) is not dict:
        metadata = field_coercion.metadata(record, repairs)
    severity = get("severity")
    if severity is not None and (type(severity) is not str or severity not in field_coercion.SEVERITY_SET):
        severity = field_coercion.severity_word(severity, repairs)
    finding_ids = strings(get("related_finding_ids") or get("correlation_refs") or [], "correlation_refs", repairs)
    kind, identity, insight = get("correlation_type"), get("id"), metadata.get("insight")
    if type(identity) is not str or not identity:
        identity = field_coercion.identity(identity, "correlation", (title, description, finding_ids), repairs)
    score = number(get("risk_score"), "risk_score", repairs)
    tags = strings(get("tags") or [], "tags", repairs)
    size = len(title) + len(description) + len(identity) + count_characters(metadata)
    if size + len("".join(finding_ids)) + len("".join(tags)) > MAX_CHARACTERS:
        raise InvalidRecord("too_large", f"more than {MAX_CHARACTERS} characters of text")
    return Correlation(
        id=identity,
        title=title,
        description=description,
        type=kind if isinstance(kind, str) else "",
        strength=field_coercion.fraction(get("correlation_strength"), "correlation_strength", repairs),
        finding_ids=finding_ids,
        severity=severity,
        risk_score=None if score is None else field_coercion.clamped_score(score, repairs),
        risk_score_delta=number(get("risk_score_delta"), "risk_score_delta", repairs),
        tags=tags,
        insight=insight if isinstance(insight, str) else "",
        metadata=metadata,
    )


def count_characters(fields: dict[str, Any]) -> int:
    """Counts the characters of all keys and strings in free fields.

    Raises:
        InvalidRecord: the fields are nested deeper than :data:`MAX_DEPTH`.
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


def record_of_row(row: Any) -> Any:
    """Converts a row of a table (Parquet, a Hugging Face dataset) to the record that JSON would hold.

    A table has a null for each field that only other rows have, and may store objects as JSON text.
    """
    if not isinstance(row, dict):
        return row
    record = {name: _json_value(value) for name, value in row.items() if value is not None}
    for name, first_character in _JSON_TEXT.items():
        text = record.get(name)
        if isinstance(text, str) and text.lstrip().startswith(first_character):
            try:
                record[name] = loads(text.encode("utf-8", "surrogatepass"))[0]
            except InvalidRecord:
                continue
    return record


def _json_value(value: Any) -> Any:
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(name): _json_value(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):  # Arrow's map type
            return {str(name): _json_value(item) for name, item in value if item is not None}
        return [_json_value(item) for item in value if item is not None]
    return str(value)
