"""Seek indexes: written by a pass, extended by the next, rebuilt if corrupt."""

import io
from pathlib import Path

import pytest

from datamodules.sources import open_source, seek_index
from datamodules.sources.seek_index import SeekIndex
from tests.helpers.sources_data import FIVE_FINDINGS, gzip_bytes, read_source, read_spec, tar, write


class CountingFile(io.FileIO):
    """A file that counts the bytes that are read from it."""

    def __init__(self, path, opened):
        super().__init__(path)
        self.read_bytes = 0
        opened.append(self)

    def read(self, size=-1):
        data = super().read(size)
        self.read_bytes += len(data)
        return data


class CountingLocation:
    """A location that counts the bytes that are read from its files."""

    def __init__(self, spec, opened):
        self.spec, self.opened = spec, opened

    def open(self, file):
        return CountingFile(file.path, self.opened)


def index_path(folder):
    (path,) = folder.rglob("*.idx")
    return path


def test_a_later_start_uses_the_seek_points_of_a_pass(tmp_path, small_steps, big_archive):
    source = open_source(big_archive, cache_dir=tmp_path / "cache")
    assert read_source(source)[0] == list(range(40))
    index = SeekIndex.load(index_path(tmp_path / "cache"))
    assert index.complete and len(index.names) == 40
    assert len(index.points) > 10 * 32768  # a window of 32 KiB each
    opened = []
    source = open_source(big_archive, cache_dir=tmp_path / "cache")  # as in another process
    source.location = CountingLocation(source.location.spec, opened)
    documents = source.raw_documents((35, 0))
    assert next(documents).member == "d/35.json"
    documents.close()
    assert sum(file.read_bytes for file in opened) < 0.6 * Path(big_archive).stat().st_size  # not from the start


def test_without_a_cache_the_index_is_kept_in_memory(small_steps, big_archive):
    source = open_source(big_archive)
    assert len(source.members()) == 40
    opened = []
    source.location = CountingLocation(source.location.spec, opened)
    assert [raw.member_index for raw in source.read_member(35)] == [35]
    assert sum(file.read_bytes for file in opened) < 0.6 * Path(big_archive).stat().st_size


def test_the_next_pass_extends_the_index_of_an_interrupted_one(tmp_path, small_steps, big_archive):
    source = open_source(big_archive, cache_dir=tmp_path / "cache")
    documents = source.raw_documents()
    for _ in range(20):
        next(documents)
    documents.close()
    path = index_path(tmp_path / "cache")
    half = SeekIndex.load(path)
    assert not half.complete and 15 <= len(half.names) <= 20
    assert read_source(source, (15, 0))[0] == list(range(15, 40))
    whole = SeekIndex.load(path)
    assert whole.complete and len(whole.names) == 40 and len(whole.points) > len(half.points)
    assert read_source(source, (38, 0))[0] == [38, 39]
    half.save(path)  # the older index of a slower worker does not replace it
    assert SeekIndex.load(path).complete


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-7], lambda d: d[:20], lambda d: b"", lambda d: d[:60] + b"X" + d[61:]]
)
def test_a_corrupt_index_is_rebuilt(tmp_path, small_steps, big_archive, damage):
    source = open_source(big_archive, cache_dir=tmp_path / "cache")
    read_source(source)
    path = index_path(tmp_path / "cache")
    path.write_bytes(damage(path.read_bytes()))
    assert SeekIndex.load(path) is None
    source = open_source(big_archive, cache_dir=tmp_path / "cache")  # as in another process
    assert read_source(source, (30, 0))[0] == list(range(30, 40))
    assert read_source(source)[0] == list(range(40))
    assert SeekIndex.load(path).complete


def test_an_unwritable_cache_is_no_error(tmp_path):
    spec = write(tmp_path / "a.tar.gz", gzip_bytes(tar(FIVE_FINDINGS)))
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert read_spec(spec, cache_dir=blocked)[0] == [0, 1, 2, 3, 4]


def test_the_nearest_entry_is_at_or_before_the_place(monkeypatch):
    monkeypatch.setattr(seek_index, "MIN_ENTRY_SPACING", 10)
    index = SeekIndex()
    for member, position, offset in [(0, 0, 0), (0, 5, 20), (1, 0, 25), (2, 0, 40), (2, 7, 90), (2, 7, 99)]:
        index.add(member, position, offset, f"m{member}")
    assert index.names == ["m0", "m1", "m2"]
    assert index.entries == [(0, 0, 0), (0, 5, 20), (2, 0, 40), (2, 7, 90)]  # (1, 0) is too near to (0, 5)
    assert index.nearest(0, 4) == (0, 0, 0)
    assert index.nearest(0, 5) == index.nearest(1, 99) == (0, 5, 20)
    assert index.nearest(2, 6) == (2, 0, 40)
    assert index.nearest(9, 0) == (2, 7, 90)


def test_a_saved_index_is_read_back(tmp_path):
    index = SeekIndex()
    path = tmp_path / "folder/a.idx"
    index.save(path)  # nothing is known yet
    assert not path.exists()
    index.names, index.complete, index.points = ["a", "\N{SNOWMAN}"], True, b"\x00points"
    index.entries.append((1, 0, 10**12))
    index.save(path)
    loaded = SeekIndex.load(path)
    assert vars(loaded) == vars(index)
    assert [file.name for file in path.parent.iterdir()] == ["a.idx"]
    assert SeekIndex.load(tmp_path / "none.idx") is None
