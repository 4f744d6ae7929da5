"""Progress of reading the sources in bytes, and a progress bar with the remaining time if the sizes are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from datamodules.sources.filesystem import File, Location
from datamodules.sources.readers import Archive, Files, Source
from datamodules.stream.epoch_order import WHOLE, Place, Unit

if TYPE_CHECKING:
    from datamodules.statistics.summary import DatasetSummary


class _TrackedLocation(Location):
    """A location that keeps the file that it opened last; the file's position is the progress within an archive."""

    opened: list[IO[bytes]]

    @classmethod
    def of(cls, location: Location) -> _TrackedLocation:
        tracked = cls(location.spec, location.options)
        object.__setattr__(tracked, "opened", [])  # the base is a frozen dataclass
        return tracked

    def open(self, file: File) -> IO[bytes]:
        self.opened[:] = [super().open(file)]
        return self.opened[0]

    def fraction(self, size: float) -> float:
        """Returns the part of the last opened file that was read, 0..1."""
        file = self.opened[0] if self.opened else None
        return 0.0 if file is None else 1.0 if file.closed else file.tell() / max(size, 1)


class ReadingProgress:
    """Counts the bytes of an epoch that were read.

    Args:
        sources: opened sources.
        order: units of the epoch in the order of reading.
    """

    def __init__(self, sources: list[Source], order: list[Unit]) -> None:
        self._sources, self._order = sources, order
        self._sizes = [_size(sources[unit.source], unit) for unit in order]
        for source in sources:
            if isinstance(source, Archive) and source.sequential:
                source.location = _TrackedLocation.of(source.location)

    @property
    def total(self) -> float | None:
        """Bytes of all units; None if a size is not known (a data set on the hub)."""
        return None if None in self._sizes else float(sum(size or 0 for size in self._sizes))

    def done(self, place: Place) -> float:
        """Returns the bytes that are read when the document at a place is complete."""
        before = float(sum(size or 0 for size in self._sizes[: place.unit]))
        unit, size = self._order[place.unit], self._sizes[place.unit] or 0
        source = self._sources[unit.source]
        if unit.member == WHOLE and isinstance(source, Archive) and isinstance(source.location, _TrackedLocation):
            return before + size * source.location.fraction(size)
        return before + size


def _size(source: Source, unit: Unit) -> float | None:
    if isinstance(source, Archive):
        return source.file.size if unit.member == WHOLE else source.file.size / max(len(source.members()), 1)
    return source.list[unit.member].size if isinstance(source, Files) else None


@contextmanager
def progress_bar(reading: ReadingProgress, limit: int | None) -> Iterator[Callable[[DatasetSummary, Place], None]]:
    """Shows a progress bar on stderr.

    Args:
        reading: the bytes that were read, and in all.
        limit: largest number of findings; None for all.

    Yields:
        A function to call after each document, with the summary so far and the document's place.
    """
    columns: tuple[Any, ...] = (
        TextColumn("inspect"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0 if limit or reading.total else None, text="")

        def show(summary: DatasetSummary, place: Place) -> None:
            findings, total = summary.counts["findings"], reading.total
            fractions = [findings / limit] if limit else []
            fractions += [reading.done(place) / total] if total else []
            bar.update(task, completed=min(max(fractions, default=0.0), 1.0), text=f"{findings:,} findings")

        yield show
