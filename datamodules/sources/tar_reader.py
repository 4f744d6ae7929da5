"""Members and lines of a byte stream: tar headers, JSON Lines.

:func:`tar_members` walks an archive without extracting anything (a member's path is only a name), and
:func:`line_chunks` cuts JSON Lines into bounded runs. A damaged tar header costs the search for the next good one.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datamodules.sources.byte_stream import PIECE, ByteStream
from datamodules.sources.field_coercion import InvalidRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = tarfile.BLOCKSIZE
HEADER_BYTES = 1 << 20  #: a long name or a pax header beyond this is hostile
CHUNK_RECORDS = 4096
CHUNK_BYTES = 16 << 20
LINE_BYTES = 256 << 20  #: a line is held in memory; an envelope of 256 MiB holds 800,000 findings
#: a line with one of these is a whole document and stands alone, so that documents' ids and summaries don't mix
DOCUMENT_MARKS = (b'"findings"', b'"enriched_findings"', b'"compression_method"', b'"compressed"')
_DATALESS = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file of an archive, or a place where the archive is damaged.

    Attributes:
        name: its path in the archive; "" at a damage.
        start: offset of its first header block, where reading can begin.
        data: offset of its bytes.
        size: their number.
        damage: what is wrong here.
    """

    name: str
    start: int
    data: int
    size: int
    damage: InvalidRecord | None = None


def tar_members(stream: ByteStream) -> Iterator[TarMember]:
    """Walks the regular files of a tar archive from the stream's offset on.

    After each the caller may read the member's bytes from the stream, or leave them. The walk ends at the archive's
    end mark, or with one damaged member where that is missing.
    """
    start, extended, lost = stream.offset, dict[str, str](), False
    while True:
        here = stream.offset
        try:
            block = stream.read(BLOCK)
            if len(block) < BLOCK:
                raise InvalidRecord("truncated_archive", "the archive has no end mark")
        except InvalidRecord as error:
            yield TarMember("", here, here, 0, error)
            return
        if not block.strip(b"\0"):
            if lost:
                continue  # may be padding inside the damaged member
            return
        info = _header(block, lost)
        if info is None:
            if not lost:
                yield TarMember("", start, here, 0, InvalidRecord("bad_header", f"at byte {here}"))
            start, extended, lost = here + BLOCK, {}, True
            continue
        if lost:
            start, lost = here, False
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if info.size <= HEADER_BYTES:
                extended |= _extension(info.type, stream, info.size)
            stream.seek(here + BLOCK + _padded(info.size))
            continue
        size = _size(extended.get("size"), info.size)
        if info.isreg() and info.type != tarfile.GNUTYPE_SPARSE:
            name = extended.get("path") or info.name
            yield TarMember(
                name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), start, here + BLOCK, size
            )
        if info.type not in _DATALESS:
            stream.seek(here + BLOCK + _padded(size))
            if stream.offset < here + BLOCK + size:
                return  # truncated inside the member: who read it knows
        start, extended = stream.offset, {}


def line_chunks(
    read: Callable[[int], bytes], *, position: int = 0, offset: int = 0, start: int = 0
) -> Iterator[tuple[int, int, list[bytes] | InvalidRecord]]:
    """Cuts JSON Lines into runs of at most :data:`CHUNK_RECORDS` lines; a line that is a document stands alone.

    Args:
        read: gives the next bytes, of at most the size asked for.
        position: number of the line where reading begins.
        offset: its offset in the uncompressed bytes.
        start: lines before this one are passed over.

    Yields:
        Number of the first line, its offset, and the lines, or why the line can't be read.
    """
    chunk: list[bytes] = []
    size, first, first_offset = 0, position, offset
    for line, length in _lines(read):
        alone = not isinstance(line, bytes) or any(mark in line for mark in DOCUMENT_MARKS)
        if chunk and (alone or len(chunk) >= CHUNK_RECORDS or size + length > CHUNK_BYTES):
            yield first, first_offset, chunk
            chunk, size = [], 0
        if position >= start:
            if not isinstance(line, bytes):
                yield position, offset, line
            elif alone:
                yield position, offset, [line]
            else:
                if not chunk:
                    first, first_offset = position, offset
                chunk.append(line)
                size += length
        position += 1
        offset += length
    if chunk:
        yield first, first_offset, chunk


def _lines(read: Callable[[int], bytes]) -> Iterator[tuple[bytes | InvalidRecord, int]]:
    """Lines and their lengths with the line end; a damage, or a line beyond the limit, comes as what is wrong."""
    held: list[bytes] = []
    size, damage = 0, None
    while damage is None:
        try:
            block = read(PIECE)
        except InvalidRecord as error:
            block, damage = b"", error
        if not block:
            break
        *complete, rest = block.split(b"\n")
        for piece in complete:
            size += len(piece)
            yield _line(held, piece, size), size + 1
            held, size = [], 0
        size += len(rest)
        if size <= LINE_BYTES:
            held.append(rest)
        else:
            held.clear()
    if size and damage is None:
        yield _line(held, b"", size), size
    if damage is not None:
        yield damage, size


def _line(held: list[bytes], last: bytes, size: int) -> bytes | InvalidRecord:
    if size > LINE_BYTES:
        return InvalidRecord("too_large", f"a line of {size} bytes")
    return b"".join([*held, last]) if held else last


def _header(block: bytes, lost: bool) -> tarfile.TarInfo | None:
    """A header whose checksum holds; while lost among a member's bytes, with the format's magic too."""
    if lost and block[257:262] != b"ustar":
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # type: ignore[arg-type, unused-ignore]
    except (tarfile.HeaderError, ValueError):
        return None
    return info if info.size >= 0 else None


def _extension(kind: bytes, stream: ByteStream, size: int) -> dict[str, str]:
    """The path and the size that a long-name or pax header gives to the next member."""
    try:
        body = stream.read(size)
    except InvalidRecord:
        return {}
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": body.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind == tarfile.XGLTYPE:
        return {}  # comments of the whole archive
    fields: dict[str, str] = {}
    while b"=" in body:
        length = body.split(b" ", 1)[0]
        if not length.isdigit() or not len(length) < int(length) <= len(body):
            break
        record, body = body[len(length) + 1 : int(length) - 1], body[int(length) :]
        key, _, value = record.partition(b"=")
        if key in (b"path", b"size"):
            fields[key.decode()] = value.decode("utf-8", "surrogateescape")
    return fields


def _size(extended: str | None, plain: int) -> int:
    return int(extended) if extended is not None and extended.isdecimal() and len(extended) < 20 else plain


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
