"""Counters of the data pipeline, the quarantine file, and the limit on invalid records."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from datamodules.errors import UserError
from datamodules.redaction import redact_text
from datamodules.tasks.base import compact_json

if TYPE_CHECKING:
    from datamodules.stream.preprocessing import PreparedDocument

MIN_RECORDS_TO_CHECK = 200  #: the quarantined share of fewer records is not a reliable estimate


class PipelineCounters:
    """Counters of one pass over the data, and its quarantine file.

    Counters: ``records``, ``quarantined``, ``quarantined.<reason>``, ``repaired.<kind>``, ``merged``,
    ``examples.<task>``, ``duplicates``, ``conflicts``, ``overflow``, ``tail``.

    Args:
        max_quarantine: largest allowed share of quarantined (invalid) records.
        path: quarantine file (JSON Lines), or None to count only.
        state: result of :meth:`state`, from which counting continues.
    """

    def __init__(
        self, max_quarantine: float, path: str | Path | None = None, state: dict[str, Any] | None = None
    ) -> None:
        self.max_quarantine, self.path = max_quarantine, Path(path) if path else None
        self.counts: Counter[str] = Counter(state["counts"] if state else {})
        self._bytes: int = state["quarantine_bytes"] if state else 0
        self._file: BinaryIO | None = None

    def state(self) -> dict[str, Any]:
        """Returns the counters and the size of the quarantine file.

        Resuming truncates the file to this size, so that records that are read again are not written twice.
        """
        return {"counts": dict(self.counts), "quarantine_bytes": self._bytes}

    def add(self, document: PreparedDocument) -> None:
        """Counts a document and writes its invalid records to the quarantine file.

        Raises:
            UserError: too many records are quarantined.
        """
        self.counts["records"] += document.records
        self.counts.update(document.counts)
        for record in document.quarantined:
            self.counts["quarantined"] += 1
            self.counts[f"quarantined.{record.reason}"] += 1
        if self.path:
            self._write(self.path, document)
        if self.counts["records"] >= MIN_RECORDS_TO_CHECK:
            self.check()

    def check(self) -> None:
        """Checks the share of quarantined records: too many of them mean that the source is probably a wrong one.

        Raises:
            UserError: the share is above ``max_quarantine``.
        """
        records, quarantined = self.counts["records"], self.counts["quarantined"]
        if not quarantined or quarantined <= self.max_quarantine * records:
            return
        prefix = "quarantined."
        reasons = Counter({name[len(prefix) :]: n for name, n in self.counts.items() if name.startswith(prefix)})
        top = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common(3))
        look = f"see {self.path}" if self.path else "set data.init_args.quarantine_path to see them"
        raise UserError(
            f"data.init_args.max_quarantine={self.max_quarantine}: {quarantined} of {records} records can't be used: "
            f"{top}. Fix: {look}, correct the source, or raise the limit"
        )

    def summary(self) -> str:
        """Returns the counters on one line, without those that are zero."""
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
        for record in document.quarantined:
            # compact_json: the name of a member may not be UTF-8
            values = {name: getattr(record, name) for name in ("member", "position", "reason", "record")}
            line = compact_json({"source": redact_text(record.source)} | values)
            self._bytes += self._file.write(f"{line}\n".encode())
        self._file.flush()
