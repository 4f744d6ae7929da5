"""What was counted on the way, what was refused, and when that is too much."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from datamodules.errors import UserError

if TYPE_CHECKING:
    from datamodules.stream.preprocessing import PreparedDocument

MIN_RECORDS = 200  #: before this many a share says nothing


class PipelineCounters:
    """Counters of one pass over the data, and its quarantine file.

    Counters: ``records``, ``quarantined``, ``quarantined.<reason>``, ``repaired.<kind>``, ``merged``,
    ``examples.<task>``, ``duplicates``, ``conflicts``, ``overflow``, ``tail``.

    Args:
        max_quarantine: greatest share of quarantined records.
        path: quarantine file (JSON Lines), or None to count only.
        state: of :meth:`state`, to go on from there.
    """

    def __init__(
        self, max_quarantine: float, path: str | Path | None = None, state: dict[str, Any] | None = None
    ) -> None:
        self.max_quarantine, self.path = max_quarantine, Path(path) if path else None
        self.counts: Counter[str] = Counter(state["counts"] if state else {})
        self._bytes: int = state["quarantine_bytes"] if state else 0
        self._file: BinaryIO | None = None

    def state(self) -> dict[str, Any]:
        """Counters and the size of the file, which resuming cuts back to: what is read again is not written twice."""
        return {"counts": dict(self.counts), "quarantine_bytes": self._bytes}

    def add(self, document: PreparedDocument) -> None:
        """Counts a document and writes what it lost.

        Raises:
            UserError: too much is quarantined.
        """
        self.counts["records"] += document.records
        self.counts.update(document.counts)
        for lost in document.quarantined:
            self.counts["quarantined"] += 1
            self.counts[f"quarantined.{lost.reason}"] += 1
        if self.path:
            self._write(self.path, document)
        if self.counts["records"] >= MIN_RECORDS:
            self.check()

    def check(self) -> None:
        """Stops a run whose data is mostly not what it takes it for.

        Raises:
            UserError: the share is above ``max_quarantine``.
        """
        records, lost = self.counts["records"], self.counts["quarantined"]
        if not lost or lost <= self.max_quarantine * records:
            return
        prefix = "quarantined."
        reasons = Counter({name[len(prefix) :]: n for name, n in self.counts.items() if name.startswith(prefix)})
        top = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common(3))
        where = f"see {self.path}" if self.path else "set data.init_args.quarantine_path to see them"
        raise UserError(
            f"data.init_args.max_quarantine: {self.max_quarantine}: {lost} of {records} records can't be used: {top}; "
            f"{where}, mend the source or raise the limit"
        )

    def summary(self) -> str:
        """What was read, in one line; names of counters that are zero are left out."""
        kinds: dict[str, list[str]] = {}
        for name, count in self.counts.most_common():
            kind, _, detail = name.partition(".")
            if count:
                kinds.setdefault(kind, []).append(f"{detail} {count:,}" if detail else f"{count:,}")
        return "; ".join(f"{kind} {', '.join(counts)}" for kind, counts in kinds.items())

    def close(self) -> None:
        """Closes the quarantine file."""
        if self._file:
            self._file.close()
            self._file = None

    def _write(self, path: Path, document: PreparedDocument) -> None:
        if self._file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._bytes = min(self._bytes, path.stat().st_size if path.exists() else 0)
            self._file = path.open("r+b" if self._bytes else "wb")
            self._file.truncate(self._bytes)
            self._file.seek(self._bytes)
        for lost in document.quarantined:
            names = ("source", "member", "position", "reason", "record")
            line = orjson.dumps({name: getattr(lost, name) for name in names}, option=orjson.OPT_APPEND_NEWLINE)
            self._bytes += self._file.write(line)
        self._file.flush()
