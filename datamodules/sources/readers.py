"""Sources that yield raw documents: a list of files, or one file that is read as a stream.

Each yields :class:`RawDocument`: the bytes (or rows) of a document with its place. A document that is not parsed costs
little. A place is (member index, position): the member in the order of the files, and the number of the document's
first record in that member.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from datamodules.sources.byte_stream import BoundedReader, ByteStream, compression_of, read_all
from datamodules.sources.decompression import DEFAULT_LIMITS, DecompressionLimits
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.filesystem import (
    COMPRESSION_SUFFIXES,
    File,
    Location,
    fingerprint,
    is_record_file,
    record_kind,
)
from datamodules.sources.seek_index import SeekIndex
from datamodules.sources.tar_reader import CHUNK_RECORDS, line_chunks, tar_members

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datamodules.sources.tar_reader import TarMember

SAVE_INTERVAL = 256 << 20  #: uncompressed bytes between two writes of a growing index


@dataclass(frozen=True, slots=True)
class RawDocument:
    """A document that is not yet parsed.

    Attributes:
        source: the source as the user named it.
        member: path inside the source; "" for a single file.
        member_index: number of the member in the order of the files.
        position: number of the document's first record in the member.
        payload: the bytes of a document (compressed or not); a list of lines or of rows; a table of rows; a
            :class:`Deferred` read; or, for an unreadable document, the
            :class:`~datamodules.sources.field_coercion.InvalidRecord` with the reason.
    """

    source: str
    member: str
    member_index: int
    position: int
    payload: Any


@dataclass(frozen=True)
class Deferred:
    """Reads the bytes of a file when it is called, so that a document that is not parsed costs nothing."""

    location: Location
    file: File

    def __call__(self, limits: DecompressionLimits) -> bytes:
        """Reads the file's bytes, without decompression.

        Raises:
            InvalidRecord: the file is too large or can't be read.
        """
        if self.file.size > limits.member_bytes:
            raise InvalidRecord("too_large", f"{self.file.size} bytes")
        try:
            with self.location.open(self.file) as file:
                return file.read()
        except OSError as error:
            raise InvalidRecord("unreadable", str(error)) from None


class Source(ABC):
    """Documents in a fixed order.

    Attributes:
        spec: the source as the user named it.
        sequential: whether members are cheap to read in their order only (a compressed archive).
    """

    spec: str
    sequential: bool = False

    @abstractmethod
    def raw_documents(self, start: tuple[int, int] = (0, 0)) -> Iterator[RawDocument]:
        """Yields the documents at and after a place (member index, position); invalid members raise no exception."""

    @abstractmethod
    def members(self) -> list[str]:
        """Lists the members in their order; an archive without a complete index is read once for that."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Returns the digest that caches use as key: of names, sizes and modification times, not of contents."""

    def read_member(self, member_index: int, position: int = 0) -> Iterator[RawDocument]:
        """Yields the documents of one member from a position on."""
        for raw in self.raw_documents((member_index, position)):
            if raw.member_index != member_index:
                return
            yield raw


class Files(Source):
    """A folder, a glob, or a single file of documents; each file is a member.

    Args:
        location: location of the files.
        files: the files, in their order.
        kind: "json", "lines" or "parquet" for all files; "" to determine it by each file's name.
        identity: the fingerprint; "" to compute it of names, sizes and times.
    """

    def __init__(self, location: Location, files: list[File], kind: str = "", identity: str = "") -> None:
        self.spec, self.location, self.list, self.kind = location.spec, location, files, kind
        self.identity = identity

    def raw_documents(self, start: tuple[int, int] = (0, 0)) -> Iterator[RawDocument]:
        """See :class:`Source`."""
        for index in range(start[0], len(self.list)):
            file = self.list[index]
            position = first = start[1] if index == start[0] else 0
            try:
                for position, payload in self._payloads(file, first):
                    yield RawDocument(self.spec, file.name, index, position, payload)
            except (OSError, pa.ArrowException, InvalidRecord) as error:
                invalid = error if isinstance(error, InvalidRecord) else InvalidRecord("unreadable", str(error))
                yield RawDocument(self.spec, file.name, index, position, invalid)

    def members(self) -> list[str]:
        """See :class:`Source`."""
        return [file.name for file in self.list]

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return self.identity or fingerprint(self.list)

    def _payloads(self, file: File, start: int) -> Iterator[tuple[int, Any]]:
        kind = self.kind or record_kind(file.name or file.path)
        if kind == "json":
            if start == 0:
                yield 0, Deferred(self.location, file)
            return
        with self.location.open(file) as opened:
            compression = compression_of(opened.read(4))
            opened.seek(0)
            if not compression and kind == "parquet":
                yield from table_chunks(opened, start)
                return
        stream = ByteStream(lambda: self.location.open(file), compression)
        try:
            if kind == "parquet":
                yield from table_chunks(pa.BufferReader(read_all(stream)), start)
            else:
                yield from ((position, lines) for position, _, lines in line_chunks(stream.read, start=start))
        finally:
            stream.close()


class Archive(Source):
    """One file that is read as a stream: a tar archive or JSON Lines, compressed or not.

    Args:
        location: location of the file.
        file: the file.
        kind: "tar" or "lines".
        compression: "gzip", "zstd" or "" for none.
        cache_dir: folder for the index of members and seek points; None to keep the index in memory only.
        limits: limits on the size of decompressed members.
    """

    def __init__(
        self,
        location: Location,
        file: File,
        kind: str,
        compression: str,
        cache_dir: Path | None = None,
        limits: DecompressionLimits = DEFAULT_LIMITS,
    ) -> None:
        self.spec, self.location, self.file, self.limits = location.spec, location, file, limits
        self.kind, self.compression = kind, compression
        self.sequential = compression != ""
        self.index_path = cache_dir / "index" / f"{self.fingerprint()}.idx" if cache_dir is not None else None
        self._complete: SeekIndex | None = None

    def raw_documents(self, start: tuple[int, int] = (0, 0)) -> Iterator[RawDocument]:
        """See :class:`Source`. The index is extended as far as the archive is read."""
        index = self._index()
        number, position, offset = index.nearest(*start)
        build = not index.complete
        try:
            # a pass over a fully indexed archive from its start needs no seek points, so that the faster reader is used
            stream = self._stream(None if index.complete and offset == 0 else index.points, build)
        except OSError as error:
            yield RawDocument(self.spec, "", number, position, InvalidRecord("unreadable", str(error)))
            return
        saved = offset
        try:
            stream.seek(offset)
            is_tar = self.kind == "tar"
            raws = self._tar(stream, index, number, start) if is_tar else self._lines(stream, index, start)
            for raw in raws:
                yield raw
                if build and stream.offset - saved > SAVE_INTERVAL:
                    saved = stream.offset
                    self._save(index, stream)
            index.complete = True
        finally:
            if build:
                self._save(index, stream)
            stream.close()

    def members(self) -> list[str]:
        """See :class:`Source`."""
        if self.kind == "lines":
            return [""]
        index = self._index()
        if not index.complete:
            index, stream = SeekIndex(), self._stream(None, build=True)
            records = (m for m in tar_members(stream) if m.error is not None or is_record_file(m.name))
            for number, member in enumerate(records):
                index.add(number, 0, member.start, member.name)
            index.complete = True
            self._save(index, stream)
            stream.close()
        return index.names

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return fingerprint([self.file])

    def _stream(self, points: bytes | None, build: bool) -> ByteStream:
        return ByteStream(lambda: self.location.open(self.file), self.compression, points=points, build=build)

    def _index(self) -> SeekIndex:
        if self._complete is not None:
            return self._complete
        index = (SeekIndex.load(self.index_path) if self.index_path is not None else None) or SeekIndex()
        self._complete = index if index.complete else None
        return index

    def _save(self, index: SeekIndex, stream: ByteStream) -> None:
        index.points = stream.seek_points() or index.points
        self._complete = index if index.complete else None
        if self.index_path is not None:
            index.save(self.index_path)

    def _lines(self, stream: ByteStream, index: SeekIndex, start: tuple[int, int]) -> Iterator[RawDocument]:
        if start[0] > 0:
            return
        _, position, offset = index.nearest(*start)
        chunks = line_chunks(stream.read, position=position, offset=offset, start=start[1])
        for first_line, line_offset, lines in chunks:
            index.add(0, first_line, line_offset, "")
            yield RawDocument(self.spec, "", 0, first_line, lines)

    def _tar(self, stream: ByteStream, index: SeekIndex, number: int, start: tuple[int, int]) -> Iterator[RawDocument]:
        for member in tar_members(stream):
            if member.error is None and not is_record_file(member.name):
                continue
            index.add(number, 0, member.start, member.name)
            if number >= start[0]:
                first = start[1] if number == start[0] else 0
                for position, payload in self._payloads(stream, member, first):
                    yield RawDocument(self.spec, member.name, number, position, payload)
            number += 1

    def _payloads(self, stream: ByteStream, member: TarMember, start: int) -> Iterator[tuple[int, Any]]:
        kind, position = record_kind(member.name), start
        try:
            if member.error is not None:
                raise member.error
            if kind == "lines" and not member.name.endswith(COMPRESSION_SUFFIXES):
                chunks = line_chunks(BoundedReader(stream, member.size).read, start=start)
                yield from ((position := first_line, lines) for first_line, _, lines in chunks)
            elif kind != "json" or start == 0:
                data = read_all(stream, member.size, self.limits)
                yield from _documents_of(data, kind, start)
        except InvalidRecord as error:
            yield position, error
        except (pa.ArrowException, OSError) as error:
            yield position, InvalidRecord("bad_table", str(error))


def table_chunks(file: IO[bytes] | pa.NativeFile, start: int = 0) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Reads a Parquet file, row group by row group.

    Args:
        file: the file.
        start: number of the first row to yield.

    Yields:
        Number of the first row, and a table of at most 4,096 rows.
    """
    table = parquet.ParquetFile(file)
    position = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if position + rows <= start:
            position += rows
            continue
        for batch in table.iter_batches(batch_size=CHUNK_RECORDS, row_groups=[group]):
            skipped = min(max(start - position, 0), batch.num_rows)
            if skipped < batch.num_rows:
                yield position + skipped, batch.slice(skipped)
            position += batch.num_rows


def _documents_of(data: bytes, kind: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yields the documents of a member's bytes; JSON is not decompressed here, but when it is parsed."""
    if kind == "json":
        yield 0, data
        return
    stream = ByteStream(lambda: BytesIO(data), compression_of(data))
    if kind == "lines":
        yield from ((position, lines) for position, _, lines in line_chunks(stream.read, start=start))
    else:
        yield from table_chunks(pa.BufferReader(read_all(stream) if compression_of(data) else data), start)
