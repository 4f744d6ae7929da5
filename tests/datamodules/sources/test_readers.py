"""Readers of files and archives: documents from any place, whatever is damaged."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.errors import UserError
from datamodules.sources import open_source, parse, readers, tar_reader
from datamodules.sources.decompression import DecompressionLimits
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.filesystem import File, Location
from datamodules.sources.readers import Deferred
from tests.helpers.findings_data import finding
from tests.helpers.sources_data import (
    COMPRESSIONS,
    FIVE_FINDINGS,
    gzip_bytes,
    json_lines,
    parquet_table,
    read_source,
    read_spec,
    shard,
    tar,
    write,
)


def test_long_files_become_many_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_reader, "CHUNK_RECORDS", 4)
    monkeypatch.setattr(readers, "CHUNK_RECORDS", 4)
    for name, data in [
        ("a.jsonl", json_lines(*range(10))),
        ("a.parquet", parquet_table(*range(10), rows_per_group=6)),
    ]:
        source = open_source(write(tmp_path / name, data))
        documents = list(source.raw_documents())
        expected = [0, 4, 8] if name == "a.jsonl" else [0, 4, 6]
        assert [raw.position for raw in documents] == expected
        assert [parse(raw).document.position for raw in documents] == expected
        for start in range(11):
            assert read_source(source, (0, start))[0] == list(range(start, 10))
    monkeypatch.setattr(tar_reader, "CHUNK_BYTES", 600)
    assert len(list(open_source(str(tmp_path / "a.jsonl")).raw_documents())) > 3


def test_documents_have_at_most_4096_records(tmp_path):
    source = open_source(write(tmp_path / "a.jsonl", json_lines(*range(9000))))
    assert [raw.position for raw in source.raw_documents()] == [0, 4096, 8192]
    source = open_source(write(tmp_path / "a.parquet", parquet_table(*range(5000), rows_per_group=5000)))
    assert [raw.position for raw in source.raw_documents()] == [0, 4096]


#: members of every kind; notes.txt is none
MIXED = {
    "d/0.json": shard(0, 1), "d/1.jsonl": json_lines(*range(2, 9)), "notes.txt": b"x" * 3000,
    "d/2.parquet": parquet_table(9, 10), "d/3.json.gz": gzip_bytes(shard(11)),
    "d/4.jsonl.zst": COMPRESSIONS[".zst"](json_lines(12, 13, 14)), "d/5.json": shard(15),
    "d/6.parquet.gz": gzip_bytes(parquet_table(16)),
}  # fmt: skip


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("cached", [False, True])
def test_reading_begins_at_any_place(tmp_path, small_steps, suffix, cached):
    spec = write(tmp_path / f"a.tar{suffix}", COMPRESSIONS[suffix](tar(MIXED)))
    options = {"cache_dir": tmp_path / "cache"} if cached else {}
    source = open_source(spec, **options)
    assert source.sequential == bool(suffix)
    whole = [(raw.member_index, raw.position, parse(raw)) for raw in source.raw_documents()]
    assert [record.id for *_, parsed in whole for record in parsed.document.findings] == [f"f{n}" for n in range(17)]
    assert source.members() == [name for name in MIXED if name != "notes.txt"]
    for place, (member, position, _) in enumerate(whole):
        rest = [(raw.member_index, raw.position, parse(raw)) for raw in source.raw_documents((member, position))]
        assert rest == whole[place:]
        one = [(raw.member_index, raw.position) for raw in source.read_member(member, position)]
        assert one == [(m, p) for m, p, _ in whole[place:] if m == member]
    assert list(source.raw_documents((99, 0))) == []


def test_documents_that_are_not_needed_are_not_parsed(tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "a.tar.gz", gzip_bytes(tar(FIVE_FINDINGS))))
    monkeypatch.setattr("datamodules.sources.decompression.orjson.loads", None)
    assert len(list(source.raw_documents())) == 4
    monkeypatch.undo()
    write(tmp_path / "d/a.json", shard(0))
    source = open_source(str(tmp_path / "d"))
    (tmp_path / "d/a.json").unlink()  # a folder's files are opened only when they are parsed
    (raw,) = source.raw_documents()
    assert [entry.reason for entry in parse(raw).quarantined] == ["unreadable"]


def test_a_deferred_file_is_read_within_the_limit(tmp_path):
    path = write(tmp_path / "a.json", b"123456")
    deferred = Deferred(Location(path), File(path, "", 6, ""))
    assert deferred(DecompressionLimits(member_bytes=6)) == b"123456"
    with pytest.raises(InvalidRecord, match="too_large: 6 bytes"):
        deferred(DecompressionLimits(member_bytes=5))


def test_an_archive_that_disappears_is_a_quarantined_document(tmp_path):
    spec = write(tmp_path / "a.tar", tar(FIVE_FINDINGS))
    source = open_source(spec)
    (tmp_path / "a.tar").unlink()
    assert read_source(source) == ([], ["unreadable"])


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "empty"),
        (b'{"data": {"findings"', "bad_json"),
        (b'{"compressed": true, "data": "abc"}', "bad_hex"),
        (shard(7)[:-60] + b'"}', "truncated_gzip"),
        (b"[" * 3000, "too_deep"),
        (
            b'{"compressed": true, "data": "' + gzip_bytes(b" " * (48 << 20)).hex().encode() + b'"}',
            "decompression_bomb",
        ),
        (b" " * (2 << 20), "too_large"),
    ],
)
def test_an_invalid_member_costs_only_itself(tmp_path, bad, reason, suffix):
    members = {"0.json": shard(0), "../../1.json": bad, "2.json": shard(2)}
    spec = write(tmp_path / f"a.tar{suffix}", COMPRESSIONS[suffix](tar(members)))
    limits = DecompressionLimits(member_bytes=1 << 20) if reason == "too_large" else DecompressionLimits()
    for options in ({}, {"cache_dir": tmp_path / "cache"}):
        source = open_source(spec, limits=limits, **options)
        assert read_source(source) == ([0, 2], [reason])
        (entry,) = [entry for raw in source.raw_documents() for entry in parse(raw).quarantined]
        assert (entry.source, entry.member, entry.position) == (spec, "../../1.json", 0)


def test_a_decompression_bomb_in_an_archive_costs_only_its_member(tmp_path):
    members = {"0.json": shard(0), "bomb.json": b" " * (100 << 20), "2.json": shard(2)}
    spec = write(tmp_path / "a.tar.gz", gzip_bytes(tar(members)))
    assert read_spec(spec) == ([0, 2], ["decompression_bomb"])


def test_documents_on_lines_stay_separate(tmp_path):
    truth = {"version": "ground_truth_v1", "enriched_findings": [finding(0)], "summaries": {"executive_summary": "one"}}
    data = b"".join(json.dumps(truth).encode() + b"\n" for _ in range(3)) + json_lines(1, 2)
    documents = [parse(raw).document for raw in open_source(write(tmp_path / "a.jsonl", data)).raw_documents()]
    assert [len(document.findings) for document in documents] == [1, 1, 1, 2]
    assert [document.position for document in documents] == [0, 1, 2, 3]


FOUR_MEMBERS = tar({f"{n}.json": shard(n) for n in range(4)})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(COMPRESSIONS)), st.integers(0, 1 << 30), st.binary(min_size=1, max_size=40), st.booleans())
def test_any_damage_ends_in_quarantine_or_a_user_error(tmp_path, suffix, place, junk, cached):
    data = COMPRESSIONS[suffix](FOUR_MEMBERS)
    place %= len(data)
    damaged = data[:place] + junk + data[place + len(junk) :]
    spec = write(tmp_path / f"a.tar{suffix}", damaged)
    try:
        numbers, reasons = read_spec(spec, **({"cache_dir": tmp_path / "cache"} if cached else {}))
    except UserError:
        return
    assert len(numbers) == len(set(numbers)) and set(numbers) <= set(range(4))
    if damaged == data:
        assert (numbers, reasons) == ([0, 1, 2, 3], [])
    if not suffix and numbers != [0, 1, 2, 3]:
        assert reasons or len(numbers) >= 2  # an uncompressed tar loses at most the damaged members


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["good", "bad", "blank", "document"]), min_size=1, max_size=30), st.integers(0, 40))
def test_lines_from_any_place_lose_and_repeat_nothing(tmp_path, small_steps, kinds, start):
    data, expected = b"", []
    for number, kind in enumerate(kinds):
        if kind in ("good", "document"):
            expected.append(number)
        line = {"good": json.dumps(finding(number)).encode(), "bad": b"{", "blank": b"", "document": shard(number)}
        data += line[kind] + b"\n"
    if not expected:
        return
    spec = write(tmp_path / "a.jsonl.gz", gzip_bytes(data))
    source = open_source(spec)
    numbers, reasons = read_source(source)
    assert numbers == expected and len(reasons) == kinds.count("bad")
    assert read_source(source, (0, start))[0] == [number for number in expected if number >= start]
