"""Splits a byte stream into the members of a tar archive, or into chunks of JSON Lines.

:func:`tar_members` yields an archive's members without extracting anything (a member's path is only a name), and
:func:`line_chunks` splits JSON Lines into bounded chunks. After a damaged tar header, the next valid one is searched.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datamodules.sources.byte_stream import READ_BYTES, ByteStream
from datamodules.sources.field_coercion import InvalidRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = tarfile.BLOCKSIZE
#: largest size of a long name or a pax header; a larger one is not read, because only a hostile archive has it
HEADER_BYTES = 1 << 20
CHUNK_RECORDS = 4096
CHUNK_BYTES = 16 << 20
LINE_BYTES = 256 << 20  #: a line is kept in memory; an envelope of 256 MiB holds 800,000 findings
#: a line with one of these is a whole document and its own chunk, so that ids and summaries of documents don't mix
DOCUMENT_MARKS = (b'"findings"', b'"enriched_findings"', b'"compression_method"', b'"compressed"')
#: types of members without data after their header
_TYPES_WITHOUT_DATA = (
    tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file of an archive, or a damaged place of the archive.

    Attributes:
        name: path in the archive; "" for a damaged place.
        start: offset of the first header block, at which reading can begin.
        data: offset of the file's bytes.
        size: number of the file's bytes.
        error: the problem of a damaged place; None for a file.
    """

    name: str
    start: int
    data: int
    size: int
    error: InvalidRecord | None = None


def tar_members(stream: ByteStream) -> Iterator[TarMember]:
    """Yields the regular files of a tar archive from the stream's offset on.

    After each, the caller may read the member's bytes from the stream, or not. The iteration ends at the archive's end
    mark, or with one damaged member if the mark is missing.
    """
    start, extended, searching = stream.offset, dict[str, str](), False  # searching for the next valid header
    while True:
        header_offset = stream.offset
        try:
            block = stream.read(BLOCK)
            if len(block) < BLOCK:
                raise InvalidRecord("truncated_archive", "the archive has no end mark")
        except InvalidRecord as error:
            yield TarMember("", header_offset, header_offset, 0, error)
            return
        if not block.strip(b"\0"):
            if searching:
                continue  # it may be padding inside the damaged member
            return
        info = _header(block, searching)
        if info is None:
            if not searching:
                bad_header = InvalidRecord("bad_header", f"at byte {header_offset}")
                yield TarMember("", start, header_offset, 0, bad_header)
            start, extended, searching = header_offset + BLOCK, {}, True
            continue
        if searching:
            start, searching = header_offset, False
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if info.size <= HEADER_BYTES:
                extended |= _extension(info.type, stream, info.size)
            stream.seek(header_offset + BLOCK + _padded(info.size))
            continue
        size = _size(extended.get("size"), info.size)
        if info.isreg() and info.type != tarfile.GNUTYPE_SPARSE:
            name = extended.get("path") or info.name
            name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            yield TarMember(name, start, header_offset + BLOCK, size)
        if info.type not in _TYPES_WITHOUT_DATA:
            stream.seek(header_offset + BLOCK + _padded(size))
            if stream.offset < header_offset + BLOCK + size:
                return  # truncated inside the member: reading it raises the error
        start, extended = stream.offset, {}


def line_chunks(
    read: Callable[[int], bytes], *, position: int = 0, offset: int = 0, start: int = 0
) -> Iterator[tuple[int, int, list[bytes] | InvalidRecord]]:
    """Splits JSON Lines into chunks of at most :data:`CHUNK_RECORDS` lines; a line that is a document is its own chunk.

    Args:
        read: returns the next bytes, at most as many as its argument.
        position: number of the line at which reading begins.
        offset: offset of that line in the uncompressed bytes.
        start: number of the first line to yield.

    Yields:
        Number of the first line, its offset, and the lines; instead of them the error of an unreadable line.
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
    """Yields lines and their lengths with the line end; an error instead of a damaged or a too long line."""
    parts: list[bytes] = []  # of a line that continues in the next block
    size, damage = 0, None
    while damage is None:
        try:
            block = read(READ_BYTES)
        except InvalidRecord as error:
            block, damage = b"", error
        if not block:
            break
        *complete, rest = block.split(b"\n")
        for last_part in complete:
            size += len(last_part)
            yield _line(parts, last_part, size), size + 1
            parts, size = [], 0
        size += len(rest)
        if size <= LINE_BYTES:
            parts.append(rest)
        else:
            parts.clear()
    if size and damage is None:
        yield _line(parts, b"", size), size
    if damage is not None:
        yield damage, size


def _line(parts: list[bytes], last_part: bytes, size: int) -> bytes | InvalidRecord:
    if size > LINE_BYTES:
        return InvalidRecord("too_large", f"a line of {size} bytes")
    return b"".join([*parts, last_part]) if parts else last_part


def _header(block: bytes, searching: bool) -> tarfile.TarInfo | None:
    """Parses a header; None if its checksum is wrong.

    Args:
        block: 512 bytes.
        searching: whether the block may be a member's data, so that the format's magic is required too.
    """
    if searching and block[257:262] != b"ustar":
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # type: ignore[arg-type, unused-ignore]
    except (tarfile.HeaderError, ValueError):
        return None
    return info if info.size >= 0 else None


def _extension(kind: bytes, stream: ByteStream, size: int) -> dict[str, str]:
    """Reads the path and the size of the next member from a long-name or pax header."""
    try:
        body = stream.read(size)
    except InvalidRecord:
        return {}
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": body.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind == tarfile.XGLTYPE:
        return {}  # a comment on the whole archive
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
