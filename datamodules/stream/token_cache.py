"""Token cache: prepared documents as Arrow files, written by the first epoch, read by later epochs and runs.

There is one file per document, named by member and position. Its folder's name is a digest of everything that the
content depends on: tokenizer and template, tasks with their instructions, split settings, source, and the version of
this code. Files are written atomically. The digest at the end of a file detects later damage, and the document is then
prepared again. Ids are uint16 if they are small enough.

For each member that was read to its end, a JSON file lists the positions of its documents. When all members were read,
another one lists their order; the source itself is not read from then on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from datamodules.files import atomic_write
from datamodules.sources import Quarantined
from datamodules.stream.epoch_order import WHOLE, Place, Unit
from datamodules.stream.example_columns import Columns
from datamodules.stream.preprocessing import PreparedDocument

if TYPE_CHECKING:
    from datamodules.stream.preprocessing import DocumentProcessor
    from datamodules.stream.splits import Split

#: Version of the layout and of the steps from bytes to ids; after a change of either, old files are not used
VERSION = 3
_DIGEST = 16


class TokenCache:
    """Prepared documents of one split on disk.

    Args:
        folder: folder of the cache, shared by all runs.
        processor: prepares the documents; its settings select the sub-folder.
        split: split of the documents.
    """

    def __init__(self, folder: str | Path, processor: DocumentProcessor, split: Split) -> None:
        chat = processor.chat
        tasks = [[t.name, t.system, t.instruction] for t in processor.tasks.values()]
        settings = [
            processor.val_fraction,
            processor.test_fraction,
            processor.seed,
            processor.conflicts == "merge",
            split,
        ]
        common = [VERSION, chat.fingerprint(), tasks, settings]
        self._folders = [
            Path(folder) / f"tokens-{_digest(orjson.dumps([*common, source.fingerprint()])).hex()}"
            for source in processor.sources
        ]
        self._members: dict[Unit, list[int] | None] = {}

    def documents(self, unit: Unit) -> list[tuple[int, int]] | None:
        """Returns member and position of each document of a unit, or None if some are unknown."""
        if unit.member != WHOLE:
            positions = self._positions(unit)
            return None if positions is None else [(unit.member, position) for position in positions]
        order = _read_json(self._folders[unit.source] / "members.json")
        if order is None:
            return None
        by_member = [(member, self._positions(Unit(unit.source, member))) for member in order]
        if any(positions is None for _, positions in by_member):
            return None
        return [(member, position) for member, positions in by_member for position in positions or []]

    def load(self, unit: Unit, place: Place) -> PreparedDocument | None:
        """Reads a document; returns None if its file is missing or damaged."""
        import pyarrow as pa

        try:
            data = self._path(unit, place.position).read_bytes()
        except OSError:
            return None
        body, digest = data[:-_DIGEST], data[-_DIGEST:]
        if len(data) <= _DIGEST or _digest(body) != digest:
            return None
        with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
            table = reader.read_all()
        return _from_table(table, place)

    def save(self, unit: Unit, document: PreparedDocument) -> None:
        """Writes a document."""
        import pyarrow as pa

        table = _to_table(document)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        body = sink.getvalue().to_pybytes()
        _write(self._path(unit, document.place.position), body + _digest(body))

    def record(
        self, walked: Iterator[tuple[Place, Unit, Any]], order: Sequence[Unit], *, resumed: bool, write: bool
    ) -> Iterator[tuple[Place, Unit, Any]]:
        """Yields the documents of a walk; at the end of each member, writes the positions of its documents.

        Args:
            walked: result of :func:`datamodules.stream.epoch_order.walk`.
            order: order of the same walk.
            resumed: whether the walk begins in the middle of the epoch, so that its first member may be incomplete.
            write: whether this process writes; one process does.
        """
        partial = resumed
        current: Unit | None = None
        positions: list[int] = []
        members: dict[int, list[int]] = {}
        for place, unit, raw in walked:
            if unit != current:
                if current is not None and write:
                    self._write_positions(current, positions, members, partial)
                    partial = False
                current, positions = unit, []
            positions.append(place.position)
            yield place, unit, raw
        if current is not None and write:
            self._write_positions(current, positions, members, partial)
        if write and not resumed:
            for unit in order:
                if unit.member == WHOLE and unit.source in members:
                    _write(self._folders[unit.source] / "members.json", orjson.dumps(members[unit.source]))

    def _write_positions(self, unit: Unit, positions: list[int], members: dict[int, list[int]], partial: bool) -> None:
        members.setdefault(unit.source, []).append(unit.member)
        if not partial and self._positions(unit) is None:
            self._members[unit] = positions
            _write(self._folders[unit.source] / f"{unit.member}.json", orjson.dumps(positions))

    def _positions(self, unit: Unit) -> list[int] | None:
        if self._members.get(unit) is None:
            self._members[unit] = _read_json(self._folders[unit.source] / f"{unit.member}.json")
        return self._members[unit]

    def _path(self, unit: Unit, position: int) -> Path:
        return self._folders[unit.source] / f"{unit.member}-{position}.arrow"


def _to_table(document: PreparedDocument) -> Any:
    """Returns a table with one line per example; the schema's metadata has the document's own fields as JSON."""
    import pyarrow as pa

    columns = document.columns
    narrow = np.uint16 if len(columns.tokens) == 0 or columns.tokens.max() < 1 << 16 else np.uint32
    ends = np.cumsum(columns.lengths, dtype=np.int64)
    ids = pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), pa.array(columns.tokens.astype(narrow)))
    names = ("prompts", "completions", "prefixes", "keys", "inputs", "findings")
    arrays = {"ids": ids} | {name: pa.array(getattr(columns, name)) for name in names}
    arrays |= {
        name: pa.array(codes) for name, codes in zip(("task", "severity", "category"), columns.texts, strict=True)
    }
    metadata = {
        "names": columns.names,
        "records": document.records,
        "counts": dict(document.counts),
        "quarantined": [asdict(record) for record in document.quarantined],
    }
    return pa.table(arrays).replace_schema_metadata({"document": _dumps(metadata)})


def _from_table(table: Any, place: Place) -> PreparedDocument:
    table = table.combine_chunks()
    metadata = _loads(table.schema.metadata[b"document"])
    names = ("prompts", "completions", "prefixes", "keys", "inputs", "findings")
    arrays = {name: table[name].to_numpy() for name in names}
    chunks = table["ids"].chunks
    tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks]) if chunks else np.empty(0)
    texts = np.stack([table[name].to_numpy() for name in ("task", "severity", "category")])
    columns = Columns(tokens=tokens.astype(np.int32), **arrays, texts=texts, names=metadata["names"])
    quarantined = [Quarantined(**record) for record in metadata["quarantined"]]
    return PreparedDocument(place, columns, metadata["records"], Counter(metadata["counts"]), quarantined)


def _dumps(value: Any) -> bytes:
    """Returns JSON; names of categories and files may hold lone surrogates, which only Python's own encoder keeps."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value).encode()


def _loads(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _write(path: Path, data: bytes) -> None:
    """Writes a file atomically; processes that write the same file write the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)


def _read_json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
