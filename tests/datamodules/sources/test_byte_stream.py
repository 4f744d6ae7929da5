"""Byte streams: reading, seeking, seek points, damaged and truncated files of every compression."""

import io
import os
from pathlib import Path

import pytest

from datamodules.sources import byte_stream
from datamodules.sources.byte_stream import BoundedReader, ByteStream, GzipReader, compression_of, read_all
from datamodules.sources.decompression import DecompressionLimits
from datamodules.sources.field_coercion import InvalidRecord
from tests.helpers.sources_data import COMPRESSIONS, gzip_bytes, json_lines, read_spec, write

DATA = os.urandom(300_000) + bytes(100_000) + os.urandom(99_999)


def stream_of(data, **options):
    return ByteStream(lambda: io.BytesIO(data), compression_of(data), **options)


@pytest.mark.parametrize(("suffix", "name"), [("", ""), (".gz", "gzip"), (".zst", "zstd")])
def test_the_compression_is_known_from_the_first_bytes(suffix, name):
    assert compression_of(COMPRESSIONS[suffix](b"text")) == name
    assert compression_of(b"") == ""


@pytest.mark.parametrize("build", [False, True])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_reads_add_up_to_the_data(suffix, build):
    stream = stream_of(COMPRESSIONS[suffix](DATA), build=build)
    parts = [stream.read(size) for size in (1, 0, 70_000, 3, 10**6, 5)]
    assert [len(part) for part in parts] == [1, 0, 70_000, 3, len(DATA) - 70_004, 0]
    assert b"".join(parts) == DATA
    assert stream.offset == len(DATA)
    stream.close()


@pytest.mark.parametrize("build", [False, True])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_seeking_forward_and_back(suffix, build, monkeypatch):
    monkeypatch.setattr(byte_stream, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(byte_stream, "SEEK_POINT_SPACING", 1 << 16)
    stream = stream_of(COMPRESSIONS[suffix](DATA), build=build)
    for offset in (5, 300_000, 7, 499_990, 0, 123_456):
        stream.seek(offset)
        assert stream.offset == offset
        assert stream.read(20) == DATA[offset : offset + 20]
    stream.seek(10**9)
    assert stream.offset == len(DATA)
    assert stream.read(1) == b""


def test_seek_points_of_one_pass_serve_another(monkeypatch):
    monkeypatch.setattr(byte_stream, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(byte_stream, "SEEK_POINT_SPACING", 1 << 16)
    compressed = gzip_bytes(DATA)
    first = stream_of(compressed, build=True)
    while first.read(1 << 16):
        pass
    points = first.seek_points()
    assert len(points) > 3 * 32768  # a window of 32 KiB each
    second = stream_of(compressed, points=points)
    second.seek(480_000)
    assert second.read(30) == DATA[480_000:480_030]
    assert stream_of(compressed).seek_points() is None
    assert stream_of(DATA, build=True).seek_points() is None


@pytest.mark.parametrize("build", [False, True])
def test_the_bytes_before_a_damaged_place_are_read(build):
    compressed = bytearray(gzip_bytes(DATA))
    middle = len(compressed) // 2
    compressed[middle : middle + 64] = b"\xff" * 64
    stream = stream_of(bytes(compressed), build=build)
    read = stream.read(len(DATA))
    assert DATA.startswith(read[:100_000]) and len(read) > 100_000
    with pytest.raises(InvalidRecord, match="damaged_archive: at byte"):
        while stream.read(1000):
            pass
    stream.seek(0)  # an error is final: the caller has read all that is readable
    with pytest.raises(InvalidRecord, match="damaged_archive"):
        stream.read(1)
    assert stream.seek_points() is None


@pytest.mark.parametrize("build", [False, True])
def test_a_truncated_gzip_file_is_an_error_after_its_last_byte(build):
    stream = stream_of(gzip_bytes(DATA)[:-9], build=build)
    assert DATA.startswith(stream.read(len(DATA)))
    assert stream.offset > len(DATA) - 2000
    with pytest.raises(InvalidRecord, match="truncated_archive"):
        stream.read(1)


def test_a_file_that_can_not_be_read_is_an_error():
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError("disk failed")

    stream = ByteStream(lambda: Broken(b"abc"), "")
    with pytest.raises(InvalidRecord, match="damaged_archive: at byte 0: disk failed"):
        stream.read(1)


def test_the_gzip_reader_reads_all_members_and_padding():
    data = gzip_bytes(b"one ") + gzip_bytes(b"two ") + b"\0" * 700 + gzip_bytes(b"three") + b"\0" * 9
    for read_bytes in (1, 5, 512, 1 << 18):
        reader = GzipReader(io.BytesIO(data), read_bytes)
        read = b""
        while chunk := reader.read(3):
            assert len(chunk) <= 3
            read += chunk
        assert read == b"one two three"
        assert reader.read(3) == b""


@pytest.mark.parametrize("cut", [0, 300])
def test_a_file_of_several_gzip_members(tmp_path, cut):
    data = b"".join(gzip_bytes(json_lines(n, n + 1)) for n in range(0, 400, 2)) + b"\0" * 100
    path = write(tmp_path / "a.jsonl.gz", data[: len(data) - cut])
    numbers, reasons = read_spec(path, cache_dir=tmp_path / "cache")
    assert numbers == list(range(len(numbers)))
    assert (len(numbers), reasons) == (400, []) if not cut else (len(numbers) > 390 and "truncated_archive" in reasons)


@pytest.mark.parametrize("cached", [False, True])
def test_the_members_before_a_damaged_place_are_read(tmp_path, big_archive, cached):
    data = bytearray(Path(big_archive).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = b"\xff" * 64
    Path(big_archive).write_bytes(bytes(data))
    numbers, reasons = read_spec(big_archive, **({"cache_dir": tmp_path / "cache"} if cached else {}))
    assert numbers[:17] == list(range(17))
    assert reasons


def test_a_bounded_reader_stops_at_its_size():
    stream = stream_of(b"abcdefgh")
    reader = BoundedReader(stream, 5)
    assert [reader.read(3), reader.read(3), reader.read(3)] == [b"abc", b"de", b""]
    assert stream.read(9) == b"fgh"
    reader = BoundedReader(stream_of(b"abc"), 5)
    assert reader.read(9) == b"abc"
    with pytest.raises(InvalidRecord, match="truncated_archive: 2 bytes are missing"):
        reader.read(9)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_read_all_reads_a_member_or_the_whole_stream(suffix):
    stream = stream_of(COMPRESSIONS[suffix](DATA))
    assert read_all(stream, 1000) == DATA[:1000]
    assert read_all(stream, 0) == b""
    assert read_all(stream) == DATA[1000:]
    with pytest.raises(InvalidRecord, match="truncated_archive: 0 of 5 bytes"):
        read_all(stream, 5)


def test_read_all_checks_the_limits():
    limits = DecompressionLimits(member_bytes=1 << 20, ratio=10, ratio_floor=1 << 10)
    with pytest.raises(InvalidRecord, match="too_large: 1048577 bytes"):
        read_all(stream_of(b""), (1 << 20) + 1, limits)
    with pytest.raises(InvalidRecord, match="too_large: more than 1048576"):
        read_all(stream_of(bytes((1 << 20) + 1)), None, limits)
    bomb = gzip_bytes(bytes(8 << 20))
    with pytest.raises(InvalidRecord, match="decompression_bomb"):
        read_all(stream_of(bomb), None, DecompressionLimits(ratio=10, ratio_floor=1 << 10))
