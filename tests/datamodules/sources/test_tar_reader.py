"""Tar archives and JSON Lines: names, damaged headers, truncation, long lines."""

import io
import shutil
import tarfile

import pytest

from datamodules.sources import open_source, parse, tar_reader
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.tar_reader import line_chunks
from tests.helpers.sources_data import (
    COMPRESSIONS,
    gzip_bytes,
    json_lines,
    read_source,
    read_spec,
    shard,
    tar,
    write,
)


def chunks(data, block=7, **options):
    """Chunks of lines of bytes that are read in small blocks."""
    stream = io.BytesIO(data)
    return list(line_chunks(lambda size: stream.read(min(size, block)), **options))


def test_member_paths_are_never_opened(tmp_path):
    members = {"../../evil.json": shard(0), "/etc/absolute.json": shard(1), "d/\udcff.json": shard(2),
               "n" * 150 + ".json": shard(3)}  # fmt: skip
    for format_ in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        before = sorted(tmp_path.rglob("*"))
        spec = write(tmp_path / "in/a.tar", tar(members, format=format_, errors="surrogateescape"))
        source = open_source(spec)
        assert read_source(source) == ([0, 1, 2, 3], [])
        assert source.members()[:2] == ["../../evil.json", "/etc/absolute.json"]
        assert source.members()[3] == "n" * 150 + ".json"
        assert source.members()[2].isprintable()
        assert [p for p in sorted(tmp_path.rglob("*")) if p.name not in ("in", "a.tar")] == before
        shutil.rmtree(tmp_path / "in")


def test_links_and_folders_are_no_members(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, kind in [("d", tarfile.DIRTYPE), ("d/l.json", tarfile.SYMTYPE), ("d/h.json", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            file.addfile(info)
        data = shard(0)
        info = tarfile.TarInfo("d/a.json")
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
    assert read_spec(write(tmp_path / "a.tar", buffer.getvalue())) == ([0], [])


def test_a_damaged_header_costs_its_member(tmp_path):
    data = bytearray(tar({"0.json": shard(0), "1.json": shard(1), "2.json": shard(2)}))
    data[data.index(b"1.json")] ^= 0xFF
    for suffix, compress in COMPRESSIONS.items():
        source = open_source(write(tmp_path / f"a.tar{suffix}", compress(bytes(data))), cache_dir=tmp_path / "cache")
        assert read_source(source) == ([0, 2], ["bad_header"])
        assert source.members() == ["0.json", "", "2.json"]
        assert read_source(source, (2, 0)) == ([2], [])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_the_members_before_a_truncation_are_read(tmp_path, suffix, cached):
    members = {f"{n}.json": shard(n) for n in range(6)}
    whole = tar(members)
    options = {"cache_dir": tmp_path / "cache"} if cached else {}
    inside = whole.index(b"3.json") + 512 + 100
    header = whole.index(b"3.json") + 100
    between = whole.index(b"3.json")
    for number, cut in enumerate((inside, header, between)):
        end = -8 if suffix == ".gz" else None  # without the end of the gzip stream too
        compressed = COMPRESSIONS[suffix](whole[:cut])[:end]
        source = open_source(write(tmp_path / f"{number}.tar{suffix}", compressed), **options)
        assert read_source(source) == ([0, 1, 2], ["truncated_archive"])
        assert len(source.members()) == 4


def test_a_header_with_a_too_large_size(tmp_path):
    data = bytearray(tar({"0.json": shard(0), "1.json": shard(1), "2.json": shard(2)}))
    start = data.index(b"1.json")
    info = tarfile.TarInfo("1.json")
    info.size = 1 << 40
    data[start : start + 512] = info.tobuf(format=tarfile.GNU_FORMAT)
    for suffix, compress in COMPRESSIONS.items():
        assert read_spec(write(tmp_path / f"a.tar{suffix}", compress(bytes(data)))) == ([0], ["too_large"])


def test_the_lines_before_a_truncation_are_read(tmp_path):
    data = json_lines(*range(50))
    numbers, reasons = read_spec(write(tmp_path / "a.jsonl.gz", gzip_bytes(data)[:-20]))
    assert numbers == list(range(len(numbers))) and len(numbers) > 10
    assert "truncated_archive" in reasons
    members = {"a.json": shard(100), "b.jsonl": data}
    whole = tar(members)
    numbers, reasons = read_spec(write(tmp_path / "a.tar", whole[: whole.index(b'"f30"')]))
    assert numbers == [100, *range(30)] and reasons == ["truncated_archive"]


def test_invalid_and_too_long_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_reader, "LINE_BYTES", 1 << 20)
    data = json_lines(0) + b"x" * (2 << 20) + b"\n" + json_lines(1) + b"\xff\xfe\n{\n" + json_lines(2)
    source = open_source(write(tmp_path / "a.jsonl", data))
    assert read_source(source) == ([0, 1, 2], ["too_large", "bad_json", "bad_json"])
    positions = [entry.position for raw in source.raw_documents() for entry in parse(raw).quarantined]
    assert positions == [1, 3, 4]


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_chunks_have_line_numbers_and_offsets(block, monkeypatch):
    monkeypatch.setattr(tar_reader, "CHUNK_RECORDS", 2)
    data = b'ab\n\nc\n{"findings": []}\nd\ne'
    expected = [(0, 0, [b"ab", b""]), (2, 4, [b"c"]), (3, 6, [b'{"findings": []}']), (4, 23, [b"d", b"e"])]
    assert chunks(data, block) == expected
    assert chunks(data, block, start=1) == [(1, 3, [b"", b"c"]), *expected[2:]]
    assert chunks(data[6:], block, position=3, offset=6, start=4) == expected[3:]
    assert chunks(b"") == []


def test_a_chunk_ends_at_the_byte_limit(monkeypatch):
    monkeypatch.setattr(tar_reader, "CHUNK_BYTES", 6)
    assert [lines for *_, lines in chunks(b"ab\ncd\nef\n")] == [[b"ab", b"cd"], [b"ef"]]


def test_an_error_while_reading_ends_the_lines():
    blocks = iter([b"ab\ncd", InvalidRecord("damaged_archive")])

    def read(size):
        block = next(blocks)
        if isinstance(block, InvalidRecord):
            raise block
        return block

    (first, second) = line_chunks(read)
    assert first == (0, 0, [b"ab"])
    assert (second[0], second[1], second[2].reason) == (1, 3, "damaged_archive")
