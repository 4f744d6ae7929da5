"""Parses raw documents: the bytes of a shard, or the rows of a table, to a :class:`~datamodules.records.Document`.

Layouts of a file, recognised by its content::

    envelope          {"compressed": true, "compression_method": "gzip", "data": "<hex of gzip of a document>"}
    batch document    {"metadata": ..., "data": {"findings": {category: {severity: [finding]}}, "correlations": [...]}}
    its inner data    {"findings": ..., "correlations": ...}
    ground_truth_v1   {"enriched_findings": [...], "correlations": [...], "summaries": ..., "actions": [...]}
    loose records     a finding, a correlation, or a list of any of these

A generation report is skipped and counted. Anything else, and anything damaged, is quarantined with a reason, and the
rest is read. Compressed data are decompressed in bounded chunks, so that a decompression bomb is detected at its limit
and not after it. The strict parser (orjson) reads valid text; a document that it rejects is read once more by the
tolerant one (the standard library's), so that NaN or invalid UTF-8 in one record costs that record and not the shard.
"""

from __future__ import annotations

import gc
import json
from binascii import Error as HexError
from binascii import unhexlify
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import orjson
import pyarrow as pa

from datamodules.records import Document
from datamodules.sources.decompression import (
    DEFAULT_LIMITS,
    GZIP_MAGIC,
    ZSTD_MAGIC,
    DecompressionLimits,
    DuplicateKeys,
    inflate,
    is_json_object,
    loads,
    strict_json_error,
)
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.readers import Deferred, RawDocument
from datamodules.sources.record_validation import count_characters, read_correlation, read_finding, record_of_row

EXCERPT_CHARACTERS = 2000  #: characters of a quarantined record that are kept


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A record or member that can't be used.

    Attributes:
        source: the source as the user named it.
        member: path inside the source.
        position: index of the record within the member.
        reason: a short identifier by which such records are counted.
        record: the record's JSON text, cut to 2,000 characters.
        detail: the exact problem, as text for people.
    """

    source: str
    member: str
    position: int
    reason: str
    record: str
    detail: str = ""


@dataclass(slots=True)
class Parsed:
    """The result of parsing one raw document.

    Attributes:
        document: the usable records.
        quarantined: the other records.
        repairs: counts of repairs by name.
        records: number of findings, correlations and quarantined entries together.
        skipped: counts of well-formed data without findings, by kind ("generation_report").
    """

    document: Document
    quarantined: list[Quarantined] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)
    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def parse(raw: RawDocument, limits: DecompressionLimits = DEFAULT_LIMITS) -> Parsed:
    """Parses a raw document.

    Args:
        raw: a document of a source.
        limits: limits on the size of decompressed data.

    Returns:
        The usable records, and those that are invalid as ``quarantined``: invalid data raise no exception.
    """
    payload = raw.payload
    reader = Reader(raw.source, raw.member, raw.position, limits)
    gc_was_enabled = gc.isenabled()
    gc.disable()  # records hold no reference cycles, and repeated collections took a third of the time
    try:
        if isinstance(payload, InvalidRecord):
            raise payload
        if isinstance(payload, Deferred):
            payload = payload(limits)
        if isinstance(payload, bytes):
            reader.read_bytes(payload)
        elif isinstance(payload, pa.RecordBatch):
            reader.read_rows(payload.to_pylist())
        elif payload and isinstance(payload[0], bytes):
            reader.read_lines(payload)
        else:
            reader.read_rows(payload)
    except InvalidRecord as error:
        reader.quarantine(error, None)
    except (pa.ArrowException, UnicodeDecodeError, OverflowError) as error:  # cells that Python can't represent
        reader.quarantine(InvalidRecord("bad_table", str(error)), None)
    finally:
        if gc_was_enabled:
            gc.enable()
    return reader.parsed


class Reader:
    """Collects the records of one raw document; ``parsed`` is the result.

    Args:
        source: the source as the user named it.
        member: path inside the source.
        position: index of the document's first record within the member.
        limits: limits on the size of decompressed data.
        strict: True if the records come from a strict JSON parser. If not (a tolerant parser, a table), each record is
            checked for violations of strict JSON.
    """

    def __init__(
        self,
        source: str,
        member: str,
        position: int,
        limits: DecompressionLimits = DEFAULT_LIMITS,
        strict: bool = True,
    ) -> None:
        self.parsed = Parsed(Document(source, member, position))
        self.limits = limits
        self.strict = strict

    def quarantine(self, error: InvalidRecord, record: Any) -> None:
        """Quarantines a record, or the bytes of a whole member."""
        document = self.parsed.document
        position = document.position + self.parsed.records
        self.parsed.records += 1
        self.parsed.quarantined.append(
            Quarantined(document.source, document.member, position, error.reason, excerpt(record), error.detail)
        )

    def read_bytes(self, data: bytes) -> None:
        """Reads one document from its bytes, compressed or not."""
        try:
            if data.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
                data = inflate(data, self.limits)
            if len(data) > self.limits.member_bytes:
                raise InvalidRecord("too_large", f"{len(data)} bytes")
            value, self.strict = loads(data)
        except InvalidRecord as error:
            lines = data.splitlines() if error.reason == "bad_json" else []
            if len(lines) > 1 and is_json_object(lines[0]):  # JSON Lines under another name
                self.read_lines(lines)
            else:
                self.quarantine(error, data)
            return
        self.read_value(value)

    def read_lines(self, lines: list[bytes]) -> None:
        """Reads JSON Lines; each line is a record, a document or an envelope."""
        for line in lines:
            if not line.strip():
                continue
            try:
                value, self.strict = loads(line)
            except InvalidRecord as error:
                self.quarantine(error, line)
            else:
                self.read_value(value)

    def read_rows(self, rows: list[dict[str, Any]]) -> None:
        """Reads rows of a table of flattened findings."""
        self.strict = False
        for row in rows:
            self.read_value(record_of_row(row))

    def read_value(self, value: Any, depth: int = 0) -> None:
        """Reads a JSON value of any layout; see the module's docstring."""
        if isinstance(value, list):
            for item in value:
                if depth < 2:
                    self.read_value(item, depth + 1)
                else:
                    self.quarantine(InvalidRecord("unknown_layout", "lists of lists"), item)
            return
        layout = layout_of(value)
        if layout != "record" and isinstance(value, DuplicateKeys):
            self.quarantine(InvalidRecord("duplicate_keys", "in the document's outermost object"), value)
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
            self.quarantine(InvalidRecord(layout, "no findings document"), value)

    def _read_envelope(self, envelope: dict[str, Any], depth: int) -> None:
        try:
            method = envelope.get("compression_method") or "gzip"
            if depth > 2 or method != "gzip":
                raise InvalidRecord("unknown_compression", "envelopes in envelopes" if depth > 2 else str(method)[:80])
            try:
                compressed = unhexlify(envelope["data"])
            except (HexError, ValueError) as error:
                raise InvalidRecord("bad_hex", str(error)) from None
            value, self.strict = loads(inflate(compressed, self.limits))
        except InvalidRecord as error:
            self.quarantine(error, envelope)
            return
        self.read_value(value, depth + 1)

    def _read_ground_truth(self, value: dict[str, Any]) -> None:
        self.read_findings(value["enriched_findings"])
        self.read_correlations(value.get("correlations"))
        summaries, actions, document = value.get("summaries"), value.get("actions"), self.parsed.document
        for name, item in summaries.items() if isinstance(summaries, dict) else ():
            if item is not None and self._is_usable(item):
                document.summaries[name] = item
        for action in actions if isinstance(actions, list) else ():
            if isinstance(action, dict) and self._is_usable(action):
                document.actions.append(action)

    def read_findings(self, value: Any, category: str = "", severity: str = "", level: int = 0) -> None:
        """Reads findings[category][severity], or a plain list of findings.

        Args:
            value: the JSON value.
            category: category of the findings that name none; "" if unknown.
            severity: severity of the findings that name none; "" if unknown.
            level: number of objects around the value.
        """
        if isinstance(value, list):
            for record in value:
                self._record(record, category, severity)
        elif isinstance(value, DuplicateKeys) or (value and (level > 1 or not isinstance(value, dict))):
            reason = "duplicate_keys" if isinstance(value, DuplicateKeys) else "unknown_layout"
            self.quarantine(InvalidRecord(reason, f"findings of {category or 'all categories'}"), value)
        elif value:
            for name, inner in value.items():
                self.read_findings(inner, category or name, name if category else "", level + 1)

    def read_correlations(self, value: Any) -> None:
        """Reads a list of correlations."""
        if isinstance(value, list):
            for record in value:
                self._record(record, correlation=True)
        elif value:
            self.quarantine(InvalidRecord("unknown_layout", "correlations are no list"), value)

    def _record(self, record: Any, category: str = "", severity: str = "", correlation: bool = False) -> None:
        parsed = self.parsed
        try:
            if not self.strict and (violation := strict_json_error(record)):
                raise InvalidRecord(*violation)
            if correlation or (not category and _is_correlation(record)):
                parsed.document.correlations.append(read_correlation(record, parsed.repairs))
            else:
                parsed.document.findings.append(read_finding(record, parsed.repairs, category, severity))
            parsed.records += 1
        except InvalidRecord as error:
            self.quarantine(error, record)

    def _is_usable(self, value: Any) -> bool:
        """Returns whether a summary or an action is usable; quarantines it if not."""
        try:
            if not self.strict and (violation := strict_json_error(value)):
                raise InvalidRecord(*violation)
            count_characters({"value": value})
        except InvalidRecord as error:
            self.quarantine(error, value)
            return False
        return True


def layout_of(value: Any) -> str:
    """Returns the name of a JSON value's layout.

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
    """Returns the JSON text of a record, or the text of bytes, cut to :data:`EXCERPT_CHARACTERS`."""
    if isinstance(record, bytes):
        return record[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")[:EXCERPT_CHARACTERS]
    try:
        text = orjson.dumps(record, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except orjson.JSONEncodeError:  # lone surrogates, deep nesting
        try:
            text = json.dumps(record, default=str)
        except (RecursionError, ValueError):
            text = f'"{type(record).__name__}"'
    return text[:EXCERPT_CHARACTERS]


def _is_correlation(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    return any(record.get(name) is not None for name in ("related_finding_ids", "correlation_type"))
