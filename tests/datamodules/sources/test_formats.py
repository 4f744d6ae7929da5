"""Wire formats: every layout, and what is broken, hostile or no findings document at all."""

import gzip
import json
from functools import partial
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datamodules.errors import UserError
from datamodules.sources.decompression import DecompressionLimits, DuplicateKeys, inflate, loads
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.formats import Reader, excerpt
from datamodules.sources.record_validation import record_of_row
from datamodules.sources.scanner_report import read_report

packed_gzip = partial(gzip.compress, mtime=0)  # the time would stand in the tests' names, other in each worker

DATA = (Path(__file__).parents[3] / "../shared/data").resolve()
REAL = pytest.mark.skipif(not DATA.is_dir(), reason="the shared real data are absent")


def finding(number=0, **changes):
    record = {
        "id": f"f{number}", "title": "World-writable file", "severity": "medium", "risk_score": 50.0,
        "base_severity_score": 50, "description": f"File {number} is world writable", "metadata": {"path": "/tmp/x"},
        "category": "world_writable", "tags": ["filesystem"], "baseline_status": "new", "correlation_refs": [],
    }  # fmt: skip
    return record | changes


def correlation(number=0, **changes):
    record = {"id": f"c{number}", "title": "Two together", "description": "why", "correlation_refs": ["f0", "f1"],
              "correlation_type": "pair", "correlation_strength": 0.5}  # fmt: skip
    return record | changes


def batch(findings, correlations=()):
    layout = {}
    for record in findings:
        layout.setdefault(record["category"], {}).setdefault(record["severity"], []).append(record)
    return {"metadata": {"version": "2.0"}, "data": {"findings": layout, "correlations": list(correlations)}}


def envelope(document, **changes):
    packed = packed_gzip(document if isinstance(document, bytes) else json.dumps(document).encode())
    return {"compressed": True, "compression_method": "gzip", "data": packed.hex()} | changes


def read(document, limits=None):
    reader = Reader("source", "member", 0, limits or DecompressionLimits())
    reader.read_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return reader.parsed


def reasons(parsed):
    return [entry.reason for entry in parsed.quarantined]


def ids(parsed):
    return [record.id for record in parsed.document.findings]


DOCUMENT = batch([finding(0), finding(1, category="dns"), finding(2, severity="high")], [correlation()])


@pytest.mark.parametrize(
    "document",
    [
        DOCUMENT,
        DOCUMENT["data"],
        envelope(DOCUMENT),
        envelope(DOCUMENT, compression_method=None),
        [DOCUMENT],
        {"findings": [finding(0), finding(2), finding(1)], "correlations": [correlation()]},
        {
            "findings": {"world_writable": [finding(0), finding(2)], "dns": [finding(1)]},
            "correlations": [correlation()],
        },
        [finding(0), finding(2), finding(1), correlation()],
    ],
)
def test_every_layout_gives_the_same_records(document):
    parsed = read(document)
    assert sorted(ids(parsed)) == ["f0", "f1", "f2"]
    assert [c.id for c in parsed.document.correlations] == ["c0"]
    assert parsed.records == 4
    assert not parsed.quarantined
    for packed in (packed_gzip, zstandard.ZstdCompressor().compress):
        assert read(packed(json.dumps(document).encode())).document == parsed.document


def test_ground_truth_has_summaries_and_actions():
    truth = {
        "version": "ground_truth_v1",
        "enriched_findings": [finding()],
        "correlations": [{"id": "c", "title": "t", "related_finding_ids": ["f0"]}],
        "summaries": {"executive_summary": "One finding.", "triage_summary": None},
        "actions": [{"id": "a", "title": "Look"}, "text"],
    }
    document = read(truth).document
    assert document.summaries == {"executive_summary": "One finding."}
    assert document.actions == [{"id": "a", "title": "Look"}]
    assert document.correlations[0].finding_ids == ["f0"]
    assert read({"metadata": {}, "data": truth}).document == document


def test_generation_report_is_skipped_by_its_shape():
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
        (packed_gzip(b"[]" * 99)[:-9], "truncated_gzip"),
        (b"\x28\xb5\x2f\xfdnonsense", "bad_compression"),
    ],
)
def test_what_is_no_document_is_quarantined(document, reason):
    parsed = read(document)
    assert reasons(parsed) == [reason]
    assert parsed.records == 1
    assert not parsed.document.findings
    assert len(parsed.quarantined[0].record) <= 2000


def test_a_damaged_checksum_is_noticed():
    packed = bytearray(packed_gzip(json.dumps(DOCUMENT).encode()))
    packed[-6] ^= 1
    assert reasons(read(bytes(packed))) == ["bad_compression"]


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
@pytest.mark.parametrize("packed", [False, True])
def test_a_hostile_record_costs_only_itself(text, reason, packed):
    good = json.dumps(finding(0)).encode(), json.dumps(finding(1)).encode()
    document = b'{"data": {"findings": {"dns": {"low": [' + b", ".join([good[0], text, good[1]]) + b"]}}}}"
    parsed = read(json.dumps(envelope(document)).encode() if packed else document)
    assert ids(parsed) == ["f0", "f1"]
    assert reasons(parsed) == [reason]
    assert parsed.records == 3
    entry = parsed.quarantined[0]
    assert (entry.source, entry.member, entry.position) == ("source", "member", 1)
    assert 0 < len(entry.record) <= 2000


@pytest.mark.parametrize("pack", [lambda data: data, packed_gzip, lambda data: packed_gzip(packed_gzip(data))])
def test_decompression_bombs_are_met_at_the_limit(pack):
    limits = DecompressionLimits(member_bytes=1 << 24, ratio=100, ratio_floor=1 << 20)
    bomb = packed_gzip(b" " * (20 << 20))
    assert reasons(read(bomb, limits)) == ["decompression_bomb"]
    assert reasons(read(pack(bomb), limits))[0] in ("decompression_bomb", "bad_json", "invalid_utf8")
    assert reasons(read({"compressed": True, "data": bomb.hex()}, limits)) == ["decompression_bomb"]
    assert reasons(read(zstandard.ZstdCompressor().compress(b" " * (20 << 20)), limits)) == ["decompression_bomb"]
    assert reasons(read(packed_gzip(bytes(range(256)) * 4 + b" " * 2000), DecompressionLimits(member_bytes=1000))) == [
        "too_large"
    ]
    assert reasons(read(b" " * 2000, DecompressionLimits(member_bytes=1000))) == ["too_large"]


def test_a_bomb_is_unpacked_in_pieces():
    import tracemalloc

    bomb = packed_gzip(b" " * (256 << 20))
    tracemalloc.start()
    with pytest.raises(InvalidRecord, match="decompression_bomb"):
        inflate(bomb)
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


def test_inflate_reads_several_gzip_members_and_padding():
    assert inflate(packed_gzip(b"one ") + packed_gzip(b"two") + b"\0" * 512) == b"one two"
    assert inflate(packed_gzip(b"")) == b""


def test_loads_is_strict_where_the_text_is():
    assert loads(b'{"a": ":", "b:c": [1]}') == ({"a": ":", "b:c": [1]}, True)
    assert loads(b'\xef\xbb\xbf{"a": 1}') == ({"a": 1}, True)
    value, clean = loads(b'{"a": {"k": 1, "k": 2}}')
    assert not clean and isinstance(value["a"], DuplicateKeys)
    assert loads(b'{"a": "\\u003a"}') == ({"a": ":"}, False)  # an escaped colon only costs the tolerant parser
    assert loads(b'{"a": NaN, "b": 123456789012345678901234567890}')[0]["b"] == float(123456789012345678901234567890)
    with pytest.raises(InvalidRecord):
        loads(b"[" + b"9" * 5000 + b"] x")


def test_json_lines_under_another_name():
    lines = [json.dumps(finding(n)).encode() for n in range(3)]
    parsed = read(b"\n".join([lines[0], b"{broken", b"", lines[1], lines[2]]))
    assert ids(parsed) == ["f0", "f1", "f2"]
    assert reasons(parsed) == ["bad_json"]


def test_duplicate_ids_are_kept():
    assert ids(read([finding(0), finding(0)])) == ["f0", "f0"]


def test_rows_of_a_table():
    row = {
        "id": "f", "title": "t", "severity": "low", "risk_score": 3, "metadata": {"pid": "1", "port": None},
        "tags": '["a", "b"]', "risk_subscores": [("impact", 0.5)], "correlation_type": None, "when": b"\xff",
    }  # fmt: skip
    plain = record_of_row(row)
    assert plain["metadata"] == {"pid": "1"}
    assert plain["tags"] == ["a", "b"]
    assert plain["risk_subscores"] == {"impact": 0.5}
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


def test_reports_of_both_versions():
    version_2 = {
        "meta": {}, "results": [
            {"scanner": "ioc", "findings": [{"id": "i", "title": "x", "severity": "high", "risk_score": "70"}]},
            {"scanner": "mounts", "findings": []}, {"scanner": "auditd", "findings": None}, "text",
            {"scanner": "suid_sgid", "findings": [{"id": "s", "title": "x", "base_severity_score": "30"}]},
        ],
    }  # fmt: skip
    parsed = read_report(version_2, "host.json")
    assert [(f.id, f.category, f.risk_score) for f in parsed.document.findings] == [
        ("i", "ioc", 70.0),
        ("s", "suid", 30.0),
    ]
    assert reasons(parsed) == ["not_an_object"]
    version_3 = {
        "fact_pack_version": "3",
        "findings": [finding(category="kernel_param", severity="error")],
        "correlations": [{"id": "c", "title": "t", "rationale": "why", "related_finding_ids": ["f0"]}],
    }
    parsed = read_report(version_3)
    assert parsed.document.findings[0].category == "kernel_params"
    assert parsed.document.findings[0].severity == "medium"  # from its score of 50
    assert parsed.document.correlations[0].finding_ids == ["f0"]
    assert read_report({"results": []}).document.findings == []
    for wrong in ({"a": 1}, [], None, {"generation_stats": {}}):
        with pytest.raises(UserError, match="no scanner report"):
            read_report(wrong, "x.json")


@REAL
@pytest.mark.parametrize(
    ("name", "findings", "correlations"),
    [
        ("batches/batch_001_20250919_081119.json", 1010, 586),
        ("batches/batch_001_20250919_081245.json", 5010, 2846),
        ("plain_batch.json", 22, 1),
        ("ground_truth_example.json", 10, 0),
    ],
)
def test_real_documents_need_no_repair(name, findings, correlations):
    parsed = read((DATA / name).read_bytes())
    assert (len(parsed.document.findings), len(parsed.document.correlations)) == (findings, correlations)
    assert parsed.records == findings + correlations
    assert not parsed.quarantined
    assert not +parsed.repairs
    assert len({record.id for record in parsed.document.findings}) == findings


@REAL
@pytest.mark.parametrize(
    ("name", "findings"), [("host_scan", 234), ("malicious1", 3), ("sample1", 2), ("sample2", 1), ("sample3", 0)]
)
def test_real_reports(name, findings):
    report = json.loads((DATA / "reports" / f"{name}.json").read_bytes())
    parsed = read_report(report)
    assert len(parsed.document.findings) == findings
    assert not parsed.quarantined
    assert all(0 < record.risk_score <= 100 for record in parsed.document.findings)


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
def test_any_bytes_end_in_quarantine_or_records(data):
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
