"""Fixtures of the tests of sources."""

import json
import os

import pytest

from datamodules.sources import byte_stream, readers, seek_index, tar_reader
from tests.helpers.findings_data import finding
from tests.helpers.sources_data import gzip_bytes, tar, write


@pytest.fixture
def small_steps(monkeypatch):
    """Makes chunks, index entries and seek points so small that a small archive has many."""
    monkeypatch.setattr(tar_reader, "CHUNK_RECORDS", 3)
    monkeypatch.setattr(readers, "SAVE_INTERVAL", 1)
    monkeypatch.setattr(seek_index, "MIN_ENTRY_SPACING", 1)
    monkeypatch.setattr(byte_stream, "SEEK_POINT_SPACING", 1 << 16)


@pytest.fixture
def big_archive(tmp_path):
    """A .tar.gz of 40 shards that hardly compress, 1.3 MB uncompressed."""
    members = {}
    for number in range(40):
        noise = os.urandom(16 << 10).hex()
        members[f"d/{number}.json"] = json.dumps([finding(number, metadata={"noise": noise})]).encode()
    return write(tmp_path / "a.tar.gz", gzip_bytes(tar(members)))
