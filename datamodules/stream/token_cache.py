"""Token cache: prepared documents as Arrow files, written by the first epoch, read by later epochs and runs.

One file per document, named by source, member and position, in a folder named by everything that its content depends
on: tokenizer and template, tasks with their instructions, split settings, source, and the version of this code. A file
is written under another name and renamed, so it is there whole or not at all; the digest at its end notices what a disk
or a hand did to it later, and the document is then prepared anew. Ids are uint16 where the vocabulary allows it.

Beside the documents lies, for each member that was read to its end, the list of its documents' positions, and, when
all were, the order of the members: then the source itself is not touched any more.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from datamodules.sources import Quarantined
from datamodules.stream.epoch_order import WHOLE, Place, Unit
from datamodules.stream.example_columns import Columns
from datamodules.stream.preprocessing import PreparedDocument

if TYPE_CHECKING:
    from datamodules.stream.preprocessing import DocumentProcessor
    from datamodules.stream.splits import Split

VERSION = 3  #: of the layout and of everything between bytes and ids; a change of either makes old files unused
_DIGEST = 16


class TokenCache:
    """Prepared documents of one split on disk.

    Args:
        folder: where; shared by all runs.
        processor: what the content depends on.
        split: which.
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
        """Member and position of each document of a unit, or None where they are not all known."""
        if unit.member != WHOLE:
            positions = self._positions(unit)
            return None if positions is None else [(unit.member, position) for position in positions]
        order = _read_json(self._folders[unit.source] / "members.json")
        if order is None:
            return None
        known = [(member, self._positions(Unit(unit.source, member))) for member in order]
        if any(positions is None for _, positions in known):
            return None
        return [(member, position) for member, positions in known for position in positions or []]

    def load(self, unit: Unit, place: Place) -> PreparedDocument | None:
        """Reads a document; None where it is missing or broken."""
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

    def follow(
        self, walked: Iterator[tuple[Place, Unit, Any]], order: Sequence[Unit], *, resumed: bool, write: bool
    ) -> Iterator[tuple[Place, Unit, Any]]:
        """Passes documents on and notes, at the end of each member, where its documents begin.

        Args:
            walked: of :func:`datamodules.stream.epoch_order.walk`.
            order: of the same walk.
            resumed: whether it began in the middle, so that its first member may be known in part only.
            write: whether this process is the one that writes.
        """
        partial = resumed
        current: Unit | None = None
        positions: list[int] = []
        members: dict[int, list[int]] = {}
        for place, unit, raw in walked:
            if unit != current:
                if current is not None and write:
                    self._note(current, positions, members, partial)
                    partial = False
                current, positions = unit, []
            positions.append(place.position)
            yield place, unit, raw
        if current is not None and write:
            self._note(current, positions, members, partial)
        if write and not resumed:
            for unit in order:
                if unit.member == WHOLE and unit.source in members:
                    _write(self._folders[unit.source] / "members.json", orjson.dumps(members[unit.source]))

    def _note(self, unit: Unit, positions: list[int], members: dict[int, list[int]], partial: bool) -> None:
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
    """One line per example; what belongs to the document is JSON in the schema's metadata."""
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
    document_facts = {
        "names": columns.names,
        "records": document.records,
        "counts": dict(document.counts),
        "quarantined": [asdict(lost) for lost in document.quarantined],
    }
    return pa.table(arrays).replace_schema_metadata({"document": orjson.dumps(document_facts)})


def _from_table(table: Any, place: Place) -> PreparedDocument:
    table = table.combine_chunks()
    facts = orjson.loads(table.schema.metadata[b"document"])
    names = ("prompts", "completions", "prefixes", "keys", "inputs", "findings")
    arrays = {name: table[name].to_numpy() for name in names}
    chunks = table["ids"].chunks
    tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks]) if chunks else np.empty(0)
    texts = np.stack([table[name].to_numpy() for name in ("task", "severity", "category")])
    columns = Columns(tokens=tokens.astype(np.int32), **arrays, texts=texts, names=facts["names"])
    quarantined = [Quarantined(**lost) for lost in facts["quarantined"]]
    return PreparedDocument(place, columns, facts["records"], Counter(facts["counts"]), quarantined)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; writers of the same file write the same, so the last may win."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _read_json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
