"""Stores the places in an archive at which reading can begin; a pass that reads the archive records them.

An index is one file in the cache folder: member names, offsets of places at which reading can begin, and gzip seek
points, after a digest of all these. Its name is the source's fingerprint, and it is replaced in one step. An incomplete
index is useful too: it covers the part of the archive that was read. A corrupt one counts as absent and is written
again.
"""

from __future__ import annotations

from bisect import bisect_right
from hashlib import sha256
from pathlib import Path

import orjson

from datamodules.files import atomic_write

MAGIC = b"sysscan-index-1\n"
MIN_ENTRY_SPACING = 256 << 10  #: smallest number of bytes between two entries; very small members share one


class SeekIndex:
    """Places in the uncompressed bytes of an archive.

    Attributes:
        names: members in the order of the file, as far as the archive was read.
        entries: (member index, position, offset), ascending.
        complete: whether the archive was read to its end.
        points: gzip seek points, or None.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.entries: list[tuple[int, int, int]] = [(0, 0, 0)]
        self.complete = False
        self.points: bytes | None = None

    @classmethod
    def load(cls, path: Path) -> SeekIndex | None:
        """Reads an index; None if there is none or if it is corrupt."""
        try:
            data = path.read_bytes()
            digest, body = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
            if not data.startswith(MAGIC) or sha256(body).digest() != digest:
                return None
        except OSError:
            return None
        header = orjson.loads(body[8 : 8 + (size := int.from_bytes(body[:8], "big"))])
        index = cls()
        index.names, index.complete = header["names"], header["complete"]
        index.entries = [(m, p, o) for m, p, o in header["entries"]]
        index.points = body[8 + size :] or None
        return index

    def save(self, path: Path) -> None:
        """Writes the index in one step, unless the file has one that reaches further.

        An error of the file system is ignored: reading then begins at the start of the archive.
        """
        if not self.complete and len(self.entries) == 1:
            return
        existing = SeekIndex.load(path)
        if existing is not None and (existing.complete, existing.entries[-1]) >= (self.complete, self.entries[-1]):
            return
        header = orjson.dumps({"names": self.names, "complete": self.complete, "entries": self.entries})
        body = len(header).to_bytes(8, "big") + header + (self.points or b"")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, MAGIC + sha256(body).digest() + body)
        except OSError:
            return

    def nearest(self, member: int, position: int) -> tuple[int, int, int]:
        """Returns the last entry at or before a member and position, as (member index, position, offset)."""
        return self.entries[bisect_right(self.entries, (member, position, 1 << 62)) - 1]

    def add(self, member: int, position: int, offset: int, name: str) -> None:
        """Adds a place, unless it is known already or within :data:`MIN_ENTRY_SPACING` of the last entry."""
        if member == len(self.names):
            self.names.append(name)
        if (member, position) > self.entries[-1][:2] and offset - self.entries[-1][2] >= MIN_ENTRY_SPACING:
            self.entries.append((member, position, offset))
