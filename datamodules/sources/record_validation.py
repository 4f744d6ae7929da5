"""One record's way through the gate: repaired and counted, or refused with a reason.

A record is a JSON object as it stands in a file. What real files get wrong and what can be mended without guessing is
mended (and counted by name in ``repairs``); where meaning would be lost, :class:`InvalidRecord` says why. The
functions run once per finding of the whole corpus: each field's good case is tested first and costs one type check.

Repairs, by name: ``number_from_string``, ``unreadable_number``, ``risk_score_from_base``, ``base_from_risk_score``,
``score_from_severity``, ``severity_alias``, ``severity_from_score``, ``score_clamped``, ``subscore_clamped``,
``unknown_category``, ``category_alias``, ``category_missing``, ``title_from_description``, ``id_from_content``,
``text_from_number``, ``unknown_baseline``, ``list_from_string``, ``list_item_dropped``, ``metadata_from_string``,
``metadata_wrapped``, ``rationale_dropped``, and ``null_<field>`` for a null where a value belongs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.records import Correlation, Finding
from datamodules.sources import field_coercion
from datamodules.sources.field_coercion import MAX_CHARACTERS, InvalidRecord, measure, number, strings

if TYPE_CHECKING:
    from collections import Counter


def read_finding(record: Any, repairs: Counter[str], category: str = "", severity: str = "") -> Finding:
    """Makes a finding of a record.

    Args:
        record: the JSON value.
        repairs: counts by name; added to.
        category: the category of the list that the record stands in, where it names none itself.
        severity: likewise the severity.

    Raises:
        Refused: no object, no text, no severity and no score, non-finite numbers, too deep, too large.
    """
    if not isinstance(record, dict):
        raise InvalidRecord("not_an_object", type(record).__name__)
    get = record.get
    title, description = field_coercion.texts(record, repairs)
    metadata = get("metadata")
    if type(metadata) is not dict:
        metadata = field_coercion.metadata(record, repairs)
    size = len(title) + len(description) + (measure(metadata) if metadata else 0)
    word, score, base = field_coercion.grade(record, severity, repairs)
    kind = get("category")
    if type(kind) is not str or kind not in field_coercion.CATEGORY_SET:
        kind = field_coercion.category(kind, category, repairs)
    baseline = get("baseline_status")
    if type(baseline) is not str or baseline not in field_coercion.BASELINE_SET:
        baseline = field_coercion.baseline(baseline, repairs)
    probability = get("probability_actionable")
    if type(probability) is not float or not 0.0 <= probability <= 1.0:
        probability = field_coercion.share(probability, "probability_actionable", repairs)
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
        size += len("".join(rationale)) + len("".join(refs)) + measure(enrichment)
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
    """Makes a correlation of a record.

    Its findings are named by ``related_finding_ids`` (``ground_truth_v1``) or by ``correlation_refs`` (batches).

    Raises:
        Refused: no object, no text, non-finite numbers, too deep, too large.
    """
    if not isinstance(record, dict):
        raise InvalidRecord("not_an_object", type(record).__name__)
    get = record.get
    rationale = get("rationale")
    explained = get("description") or " ".join(field_coercion.rationale(rationale, repairs) if rationale else [])
    title, description = field_coercion.texts({"title": get("title"), "description": explained}, repairs)
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
    size = len(title) + len(description) + len(identity) + measure(metadata)
    if size + len("".join(finding_ids)) + len("".join(tags)) > MAX_CHARACTERS:
        raise InvalidRecord("too_large", f"more than {MAX_CHARACTERS} characters of text")
    return Correlation(
        id=identity,
        title=title,
        description=description,
        type=kind if isinstance(kind, str) else "",
        strength=field_coercion.share(get("correlation_strength"), "correlation_strength", repairs),
        finding_ids=finding_ids,
        severity=severity,
        risk_score=None if score is None else field_coercion.clamped(score, repairs),
        risk_score_delta=number(get("risk_score_delta"), "risk_score_delta", repairs),
        tags=tags,
        insight=insight if isinstance(insight, str) else "",
        metadata=metadata,
    )
