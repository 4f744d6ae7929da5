"""Where an archive's members begin: the index that a reading pass writes on its way.

One file beside the cache: member names, offsets of places where reading can begin, and gzip seek points, behind a
digest. It is keyed by the source's fingerprint, replaced in one step, and worth having when half done: it then covers
the part that was read. A corrupt one counts as absent and is written anew.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from hashlib import sha256
from pathlib import Path

import orjson

MAGIC = b"sysscan-index-1\n"
SPARSENESS = 256 << 10  #: bytes between two entries: with very small members not each is worth one


class SeekIndex:
    """Places in the uncompressed bytes of an archive.

    Attributes:
        names: members in file order, as far as the archive was read.
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
        """Reads an index; None where there is none or it is corrupt."""
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
        """Writes the index in one step, unless one that reaches further is there; an unwritable place is no error."""
        if not self.complete and len(self.entries) == 1:
            return
        there = SeekIndex.load(path)
        if there is not None and (there.complete, there.entries[-1]) >= (self.complete, self.entries[-1]):
            return
        header = orjson.dumps({"names": self.names, "complete": self.complete, "entries": self.entries})
        body = len(header).to_bytes(8, "big") + header + (self.points or b"")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(MAGIC + sha256(body).digest() + body)
            os.replace(file.name, path)  # noqa: PTH105 - the name is a string
        except OSError:
            return

    def nearest(self, member: int, position: int) -> tuple[int, int, int]:
        """The last place at or before a member and position, as (member index, position, offset)."""
        return self.entries[bisect_right(self.entries, (member, position, 1 << 62)) - 1]

    def add(self, member: int, position: int, offset: int, name: str) -> None:
        """Notes a place; places already known, and those close behind the last one, cost nothing."""
        if member == len(self.names):
            self.names.append(name)
        if (member, position) > self.entries[-1][:2] and offset - self.entries[-1][2] >= SPARSENESS:
            self.entries.append((member, position, offset))
