"""Formats: every layout of a document, and damaged, hostile or other data."""

import gc
import json

import pyarrow as pa
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datamodules.sources import RawDocument, parse
from datamodules.sources.decompression import DecompressionLimits
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.formats import Reader, excerpt, layout_of
from tests.helpers.findings_data import finding
from tests.helpers.sources_data import envelope, gzip_bytes


def correlation(number=0, **changes):
    record = {"id": f"c{number}", "title": "Two together", "description": "why", "correlation_refs": ["f0", "f1"],
              "correlation_type": "pair", "correlation_strength": 0.5}  # fmt: skip
    return record | changes


def batch(findings, correlations=()):
    layout = {}
    for record in findings:
        layout.setdefault(record["category"], {}).setdefault(record["severity"], []).append(record)
    return {"metadata": {"version": "2.0"}, "data": {"findings": layout, "correlations": list(correlations)}}


def read(document, limits=None):
    reader = Reader("source", "member", 0, limits or DecompressionLimits())
    reader.read_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return reader.parsed


def reasons(parsed):
    return [entry.reason for entry in parsed.quarantined]


def ids(parsed):
    return [record.id for record in parsed.document.findings]


RECORDS = [
    finding(0, "medium", category="suid"), finding(1, "medium", category="dns"), finding(2, "high", category="suid")
]  # fmt: skip
DOCUMENT = batch(RECORDS, [correlation()])


@pytest.mark.parametrize(
    "document",
    [
        DOCUMENT,
        DOCUMENT["data"],
        envelope(DOCUMENT),
        envelope(DOCUMENT, compression_method=None),
        [DOCUMENT],
        {"findings": [RECORDS[0], RECORDS[2], RECORDS[1]], "correlations": [correlation()]},
        {"findings": {"suid": [RECORDS[0], RECORDS[2]], "dns": [RECORDS[1]]}, "correlations": [correlation()]},
        [RECORDS[0], RECORDS[2], RECORDS[1], correlation()],
    ],
)
def test_every_layout_gives_the_same_records(document):
    parsed = read(document)
    assert sorted(ids(parsed)) == ["f0", "f1", "f2"]
    assert [c.id for c in parsed.document.correlations] == ["c0"]
    assert parsed.records == 4
    assert not parsed.quarantined
    for compress in (gzip_bytes, zstandard.ZstdCompressor().compress):
        assert read(compress(json.dumps(document).encode())).document == parsed.document


def test_ground_truth_has_summaries_and_actions():
    truth = {
        "version": "ground_truth_v1",
        "enriched_findings": [finding(0)],
        "correlations": [{"id": "c", "title": "t", "related_finding_ids": ["f0"]}],
        "summaries": {"executive_summary": "One finding.", "triage_summary": None},
        "actions": [{"id": "a", "title": "Look"}, "text"],
    }
    document = read(truth).document
    assert document.summaries == {"executive_summary": "One finding."}
    assert document.actions == [{"id": "a", "title": "Look"}]
    assert document.correlations[0].finding_ids == ["f0"]
    assert read({"metadata": {}, "data": truth}).document == document


def test_a_generation_report_is_skipped():
    parsed = read({"generation_stats": {"total_findings": 3}, "batch_results": [], "system_info": {}})
    assert parsed.skipped == {"generation_report": 1}
    assert (parsed.records, parsed.quarantined) == (0, [])


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"", "empty"),
        (b"   \n", "empty"),
        (b"{", "bad_json"),
        (b"\x00\x01\x02", "bad_json"),
        (b"42", "not_an_object"),
        (b"null", "not_an_object"),
        (b"{}", "unknown_layout"),
        (b'{"findings": 3}', "unknown_layout"),
        (b"[" * 5000 + b"]" * 5000, "too_deep"),
        (b"[[[[1]]]]", "unknown_layout"),
        (b'{"data": {"findings": {"dns": {"low": 3}}}}', "unknown_layout"),
        (b'{"data": {"findings": {"dns": {"low": {"more": [1]}}}}}', "unknown_layout"),
        (b'{"data": {"findings": {}, "correlations": {"a": 1}}}', "unknown_layout"),
        (b'{"findings": {}, "findings": {"dns": []}}', "duplicate_keys"),
        (b'{"data": {"findings": {"dns": {"low": [1], "low": []}}}}', "duplicate_keys"),
        ({"results": [{"scanner": "ioc", "findings": []}]}, "scanner_report"),
        (envelope(DOCUMENT, data="abc"), "bad_hex"),
        (envelope(DOCUMENT, data="zz"), "bad_hex"),
        (envelope(DOCUMENT, data="é"), "bad_hex"),
        (envelope(DOCUMENT, data="abcd"), "truncated_gzip"),
        (envelope(DOCUMENT, data=envelope(DOCUMENT)["data"][:-40]), "truncated_gzip"),
        (envelope(DOCUMENT, data="1f8b" + "00" * 40), "bad_compression"),
        (envelope(DOCUMENT, compression_method="bzip2"), "unknown_compression"),
        (envelope(envelope(envelope(envelope(DOCUMENT)))), "unknown_compression"),
        (gzip_bytes(b"[]" * 99)[:-9], "truncated_gzip"),
        (b"\x28\xb5\x2f\xfdnonsense", "bad_compression"),
    ],
)
def test_data_without_a_document_are_quarantined(document, reason):
    parsed = read(document)
    assert reasons(parsed) == [reason]
    assert parsed.records == 1
    assert not parsed.document.findings
    assert len(parsed.quarantined[0].record) <= 2000


def test_a_damaged_checksum_is_detected():
    compressed = bytearray(gzip_bytes(json.dumps(DOCUMENT).encode()))
    compressed[-6] ^= 1
    assert reasons(read(bytes(compressed))) == ["bad_compression"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"id": "bad", "title": "t", "severity": "low", "risk_score": NaN}', "non_finite"),
        (b'{"id": "bad", "title": "t", "severity": "low", "risk_score": -Infinity}', "non_finite"),
        (b'{"id": "bad", "title": "t", "severity": "low", "metadata": {"x": [1e999]}}', "non_finite"),
        (b'{"id": "bad", "title": "t", "severity": "low", "severity": "high"}', "duplicate_keys"),
        (b'{"id": "bad", "title": "t", "severity": "low", "metadata": {"a": 1, "a": 2}}', "duplicate_keys"),
        (b'{"id": "bad", "title": "t\xff\xfe", "severity": "low"}', "invalid_utf8"),
        (b'{"id": "bad", "title": "\\ud800", "severity": "low"}', "invalid_utf8"),
        (b'{"id": "bad", "title": "t", "severity": "low", "metadata": ' + b'{"a":' * 70 + b"1" + b"}" * 71, "too_deep"),
        (
            b'{"id": "bad", "title": "t", "severity": "low", "metadata": ' + b'{"a":' * 400 + b"1" + b"}" * 401,
            "too_deep",
        ),
        (b'{"id": "bad", "title": "' + b"x" * (10 << 20) + b'", "severity": "low"}', "too_large"),
        (b'{"id": "bad", "metadata": {}, "severity": "low"}', "no_text"),
        (b'"text"', "not_an_object"),
    ],
)
@pytest.mark.parametrize("in_envelope", [False, True])
def test_a_hostile_record_costs_only_itself(text, reason, in_envelope):
    good = json.dumps(finding(0)).encode(), json.dumps(finding(1)).encode()
    document = b'{"data": {"findings": {"dns": {"low": [' + b", ".join([good[0], text, good[1]]) + b"]}}}}"
    parsed = read(json.dumps(envelope(document)).encode() if in_envelope else document)
    assert ids(parsed) == ["f0", "f1"]
    assert reasons(parsed) == [reason]
    assert parsed.records == 3
    entry = parsed.quarantined[0]
    assert (entry.source, entry.member, entry.position) == ("source", "member", 1)
    assert 0 < len(entry.record) <= 2000


@pytest.mark.parametrize("compress", [lambda data: data, gzip_bytes, lambda data: gzip_bytes(gzip_bytes(data))])
def test_decompression_bombs_are_detected_at_the_limit(compress):
    limits = DecompressionLimits(member_bytes=1 << 24, ratio=100, ratio_floor=1 << 20)
    bomb = gzip_bytes(b" " * (20 << 20))
    assert reasons(read(bomb, limits)) == ["decompression_bomb"]
    assert reasons(read(compress(bomb), limits))[0] in ("decompression_bomb", "bad_json", "invalid_utf8")
    assert reasons(read({"compressed": True, "data": bomb.hex()}, limits)) == ["decompression_bomb"]
    assert reasons(read(zstandard.ZstdCompressor().compress(b" " * (20 << 20)), limits)) == ["decompression_bomb"]
    assert reasons(read(gzip_bytes(bytes(range(256)) * 4 + b" " * 2000), DecompressionLimits(member_bytes=1000))) == [
        "too_large"
    ]
    assert reasons(read(b" " * 2000, DecompressionLimits(member_bytes=1000))) == ["too_large"]


def test_json_lines_under_another_name():
    lines = [json.dumps(finding(n)).encode() for n in range(3)]
    parsed = read(b"\n".join([lines[0], b"{broken", b"", lines[1], lines[2]]))
    assert ids(parsed) == ["f0", "f1", "f2"]
    assert reasons(parsed) == ["bad_json"]


@pytest.mark.parametrize(
    ("payload", "ids_", "reasons_"),
    [
        (json.dumps(DOCUMENT).encode(), ["f0", "f2", "f1"], []),
        ([json.dumps(finding(3)).encode(), b"", b"{"], ["f3"], ["bad_json"]),
        ([finding(3)], ["f3"], []),
        (pa.RecordBatch.from_pylist([{"id": "f3", "title": "t", "severity": "low"}]), ["f3"], []),
        (pa.RecordBatch.from_arrays([pa.array([2**62], pa.timestamp("s"))], ["id"]), [], ["bad_table"]),
        ([], [], []),
        (InvalidRecord("unreadable", "why"), [], ["unreadable"]),
    ],
)
def test_every_kind_of_payload_is_parsed(payload, ids_, reasons_):
    assert gc.isenabled()
    parsed = parse(RawDocument("source", "member", 2, 5, payload))
    assert (ids(parsed), reasons(parsed)) == (ids_, reasons_)
    assert (parsed.document.source, parsed.document.member, parsed.document.position) == ("source", "member", 5)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("value", "layout"),
    [
        ([], "not_an_object"),
        ({"compressed": True, "data": "00"}, "envelope"),
        ({"data": {"findings": {}}}, "wrapped"),
        ({"data": {}, "title": "t", "severity": "low"}, "record"),
        ({"findings": {}, "correlations": []}, "batch"),
        ({"enriched_findings": [], "findings": []}, "ground_truth"),
        ({"findings": [], "fact_pack_version": "3"}, "scanner_report"),
        ({"results": []}, "scanner_report"),
        ({"results": {}}, "unknown_layout"),
        ({"batch_results": []}, "generation_report"),
        ({"related_finding_ids": []}, "record"),
        ({"id": 1}, "unknown_layout"),
    ],
)
def test_layouts_are_recognised_by_their_content(value, layout):
    assert layout_of(value) == layout


def test_duplicate_ids_are_kept():
    assert ids(read([finding(0), finding(0)])) == ["f0", "f0"]


def test_rows_of_a_table_are_read_as_records():
    row = {
        "id": "f", "title": "t", "severity": "low", "risk_score": 3, "metadata": {"pid": "1", "port": None},
        "tags": '["a", "b"]', "risk_subscores": [("impact", 0.5)], "correlation_type": None, "when": b"\xff",
    }  # fmt: skip
    reader = Reader("s", "m", 7)
    reader.read_rows([row, {**row, "metadata": '{"x": NaN}'}, {**row, "risk_score": float("nan")}, {"id": "z"}])
    assert ids(reader.parsed) == ["f"]
    assert [(q.position, q.reason) for q in reader.parsed.quarantined] == [
        (8, "non_finite"), (9, "non_finite"), (10, "unknown_layout"),
    ]  # fmt: skip


def test_excerpts_are_cut_and_never_fail():
    assert excerpt(b"\xff" * 5000).startswith("\\xff")
    deep = []
    for _ in range(5000):
        deep = [deep]
    for record in (b"x" * 5000, {"a": "x" * 5000}, {"a": "\ud800"}, deep, {"a": object()}, None):
        assert 0 < len(excerpt(record)) <= 2000


@pytest.mark.parametrize(
    ("name", "findings", "correlations"),
    [
        ("batches/batch_001_20250919_081119.json", 1010, 586),
        ("batches/batch_001_20250919_081245.json", 5010, 2846),
        ("plain_batch.json", 22, 1),
        ("ground_truth_example.json", 10, 0),
    ],
)
def test_real_documents_need_no_repair(name, findings, correlations, shared_data):
    parsed = read((shared_data / name).read_bytes())
    assert (len(parsed.document.findings), len(parsed.document.correlations)) == (findings, correlations)
    assert parsed.records == findings + correlations
    assert not parsed.quarantined
    assert not +parsed.repairs
    assert len({record.id for record in parsed.document.findings}) == findings


WHOLE = json.dumps(envelope(DOCUMENT)).encode()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255), st.booleans())
@example(0, 255, False)
def test_a_flipped_byte_or_a_cut_never_raises(place, mask, cut):
    damaged = WHOLE[:place] if cut else WHOLE[:place] + bytes([WHOLE[place] ^ mask]) + WHOLE[place + 1 :]
    parsed = read(damaged)
    assert parsed.quarantined or sorted(ids(parsed)) == ["f0", "f1", "f2"]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_end_in_quarantine_or_records(data):
    parsed = read(data)
    assert parsed.records == len(parsed.quarantined) + len(parsed.document.findings) + len(parsed.document.correlations)


NAMES = (
    "data", "findings", "correlations", "enriched_findings", "summaries", "actions", "results", "compressed",
    "dns", "low", "title", "severity", "description", "correlation_type",
)  # fmt: skip
LAYOUT = st.sampled_from(NAMES)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LAYOUT | st.text(max_size=3), inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_any_json_ends_in_quarantine_records_or_skipped(value):
    text = json.dumps(value)  # with NaN and Infinity, and lone surrogates escaped
    parsed = read(text.encode())
    assert parsed.records == len(parsed.quarantined) + len(parsed.document.findings) + len(parsed.document.correlations)
