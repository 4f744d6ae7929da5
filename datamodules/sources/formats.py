"""The wire formats: bytes of a shard, or rows of a table, to a Document.

What can stand in a file, told apart by its content::

    envelope          {"compressed": true, "compression_method": "gzip", "data": "<hex of gzip of a document>"}
    batch document    {"metadata": ..., "data": {"findings": {category: {severity: [finding]}}, "correlations": [...]}}
    its inner data    {"findings": ..., "correlations": ...}
    ground_truth_v1   {"enriched_findings": [...], "correlations": [...], "summaries": ..., "actions": [...]}
    loose records     a finding, a correlation, or a list of any of these

A generation report is skipped and counted. Everything else, and everything broken, is quarantined with a reason, and
the rest is read. Compressed data are unpacked in bounded pieces, so that a decompression bomb is met at its limit and
not after it. The strict parser (orjson) reads the good case; a document that it refuses is read once more by the
tolerant one (the standard library's), so that NaN or broken UTF-8 in one record costs that record and not the shard.
"""

from __future__ import annotations

import json
from binascii import Error as HexError
from binascii import unhexlify
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import orjson

from datamodules.records import Document
from datamodules.sources.decompression import GZIP_MAGIC, LIMITS, ZSTD_MAGIC, Limits, inflate, loads
from datamodules.sources.field_coercion import DuplicateKeys, InvalidRecord, measure, strict_json_error
from datamodules.sources.record_validation import read_correlation, read_finding
from datamodules.sources.table_rows import plain_row

RECORD_TEXT = 2000  #: characters of a quarantined record that are kept


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A record or member that can't be used.

    Attributes:
        source: the source as the user named it.
        member: path inside the source.
        position: index of the record within the member.
        reason: a slug to count by.
        record: its JSON text, cut to 2,000 characters.
        detail: what exactly was wrong.
    """

    source: str
    member: str
    position: int
    reason: str
    record: str
    detail: str = ""


@dataclass(slots=True)
class Parsed:
    """What came out of one raw document.

    Attributes:
        document: its usable records.
        quarantined: the others.
        repairs: counts of repairs by name.
        records: findings, correlations and quarantined entries together.
        skipped: counts of what is well-formed but holds no findings, by kind ("generation_report").
    """

    document: Document
    quarantined: list[Quarantined] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)
    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class Reader:
    """Collects what stands in one raw document; ``parsed`` is the result.

    Args:
        source: the source as the user named it.
        member: path inside the source.
        position: index of the document's first record within the member.
        limits: what data may unpack to.
        clean: False where records come from a tolerant parser or a table, and are looked through for what strict JSON
            would have refused.
    """

    def __init__(self, source: str, member: str, position: int, limits: Limits = LIMITS, clean: bool = True) -> None:
        self.parsed = Parsed(Document(source, member, position))
        self.limits = limits
        self.clean = clean

    def refuse(self, error: InvalidRecord, record: Any) -> None:
        """Puts a record, or the bytes of a whole member, into quarantine."""
        at = self.parsed.document
        position = at.position + self.parsed.records
        self.parsed.records += 1
        self.parsed.quarantined.append(
            Quarantined(at.source, at.member, position, error.reason, excerpt(record), error.detail)
        )

    def read_bytes(self, data: bytes) -> None:
        """Reads one document from its bytes, packed or not."""
        try:
            if data.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
                data = inflate(data, self.limits)
            if len(data) > self.limits.member_bytes:
                raise InvalidRecord("too_large", f"{len(data)} bytes")
            value, self.clean = loads(data)
        except InvalidRecord as error:
            lines = data.splitlines() if error.reason == "bad_json" else []
            if len(lines) > 1 and _is_object(lines[0]):  # JSON Lines under another name
                self.read_lines(lines)
            else:
                self.refuse(error, data)
            return
        self.read_value(value)

    def read_lines(self, lines: list[bytes]) -> None:
        """Reads JSON Lines; each line is a record, a document or an envelope."""
        for line in lines:
            if not line.strip():
                continue
            try:
                value, self.clean = loads(line)
            except InvalidRecord as error:
                self.refuse(error, line)
            else:
                self.read_value(value)

    def read_rows(self, rows: list[dict[str, Any]]) -> None:
        """Reads rows of a table of flattened findings."""
        self.clean = False
        for row in rows:
            self.read_value(plain_row(row))

    def read_value(self, value: Any, depth: int = 0) -> None:
        """Reads whatever stands in a file; see the module's docstring."""
        if isinstance(value, list):
            for item in value:
                if depth < 2:
                    self.read_value(item, depth + 1)
                else:
                    self.refuse(InvalidRecord("unknown_layout", "lists of lists"), item)
            return
        layout = layout_of(value)
        if layout != "record" and isinstance(value, DuplicateKeys):
            self.refuse(InvalidRecord("duplicate_keys", "in the document's outermost object"), value)
        elif layout == "envelope":
            self._read_envelope(value, depth)
        elif layout == "wrapped":
            self.read_value(value["data"], depth + 1)
        elif layout == "ground_truth":
            self._read_ground_truth(value)
        elif layout == "batch":
            self.read_findings(value["findings"])
            self.read_correlations(value.get("correlations"))
        elif layout == "record":
            self._record(value)
        elif layout == "generation_report":
            self.parsed.skipped[layout] += 1
        else:
            self.refuse(InvalidRecord(layout, "no findings document"), value)

    def _read_envelope(self, envelope: dict[str, Any], depth: int) -> None:
        try:
            method = envelope.get("compression_method") or "gzip"
            if depth > 2 or method != "gzip":
                raise InvalidRecord("unknown_compression", "envelopes in envelopes" if depth > 2 else str(method)[:80])
            try:
                packed = unhexlify(envelope["data"])
            except (HexError, ValueError) as error:
                raise InvalidRecord("bad_hex", str(error)) from None
            value, self.clean = loads(inflate(packed, self.limits))
        except InvalidRecord as error:
            self.refuse(error, envelope)
            return
        self.read_value(value, depth + 1)

    def _read_ground_truth(self, value: dict[str, Any]) -> None:
        self.read_findings(value["enriched_findings"])
        self.read_correlations(value.get("correlations"))
        summaries, actions, document = value.get("summaries"), value.get("actions"), self.parsed.document
        for name, item in summaries.items() if isinstance(summaries, dict) else ():
            if item is not None and self._sound(item):
                document.summaries[name] = item
        document.actions.extend(
            a for a in (actions if isinstance(actions, list) else ()) if isinstance(a, dict) and self._sound(a)
        )

    def read_findings(self, value: Any, category: str = "", severity: str = "", level: int = 0) -> None:
        """Walks findings[category][severity], or a plain list; ``level`` counts the objects passed."""
        if isinstance(value, list):
            for record in value:
                self._record(record, category, severity)
        elif isinstance(value, DuplicateKeys) or (value and (level > 1 or not isinstance(value, dict))):
            reason = "duplicate_keys" if isinstance(value, DuplicateKeys) else "unknown_layout"
            self.refuse(InvalidRecord(reason, f"findings of {category or 'all categories'}"), value)
        elif value:
            for name, below in value.items():
                self.read_findings(below, category or name, name if category else "", level + 1)

    def read_correlations(self, value: Any) -> None:
        """Reads a list of correlations."""
        if isinstance(value, list):
            for record in value:
                self._record(record, correlation=True)
        elif value:
            self.refuse(InvalidRecord("unknown_layout", "correlations are no list"), value)

    def _record(self, record: Any, category: str = "", severity: str = "", correlation: bool = False) -> None:
        parsed = self.parsed
        try:
            if not self.clean and (found := strict_json_error(record)):
                raise InvalidRecord(*found)
            if correlation or (not category and _is_correlation(record)):
                parsed.document.correlations.append(read_correlation(record, parsed.repairs))
            else:
                parsed.document.findings.append(read_finding(record, parsed.repairs, category, severity))
            parsed.records += 1
        except InvalidRecord as error:
            self.refuse(error, record)

    def _sound(self, value: Any) -> bool:
        """Tells whether a summary or an action may be kept; puts it into quarantine where not."""
        try:
            if not self.clean and (found := strict_json_error(value)):
                raise InvalidRecord(*found)
            measure({"value": value})
        except InvalidRecord as error:
            self.refuse(error, value)
            return False
        return True


def layout_of(value: Any) -> str:
    """Names a JSON value's layout.

    Returns:
        envelope, wrapped, ground_truth, batch, record, generation_report, scanner_report, unknown_layout or
        not_an_object.
    """
    if not isinstance(value, dict):
        return "not_an_object"
    data = value.get("data")
    if isinstance(data, str) and ("compressed" in value or "compression_method" in value):
        return "envelope"
    if "fact_pack_version" in value or isinstance(value.get("results"), list):
        return "scanner_report"
    if "enriched_findings" in value:
        return "ground_truth"
    if isinstance(value.get("findings"), dict | list):
        return "batch"
    if isinstance(data, dict | list) and not ("title" in value and "severity" in value):
        return "wrapped"
    if "generation_stats" in value or "batch_results" in value:
        return "generation_report"
    if any(name in value for name in ("title", "description", "severity", "risk_score", "related_finding_ids")):
        return "record"
    return "unknown_layout"


def excerpt(record: Any) -> str:
    """Makes the JSON text of a record, or the text of bytes, cut to :data:`RECORD_TEXT` characters."""
    if isinstance(record, bytes):
        return record[:RECORD_TEXT].decode("utf-8", "backslashreplace")[:RECORD_TEXT]
    try:
        text = orjson.dumps(record, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except orjson.JSONEncodeError:  # lone surrogates, deep nesting
        try:
            text = json.dumps(record, default=str)
        except (RecursionError, ValueError):
            text = f'"{type(record).__name__}"'
    return text[:RECORD_TEXT]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _is_correlation(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    return any(record.get(name) is not None for name in ("related_finding_ids", "correlation_type"))
