"""How far a pass over the sources is, in bytes; a bar with the time left where the sizes are known."""

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


class _Watched(Location):
    """A location that remembers the file it opened last: its position is how far an archive was read."""

    opened: list[IO[bytes]]

    @classmethod
    def of(cls, location: Location) -> _Watched:
        watched = cls(location.spec, location.options)
        object.__setattr__(watched, "opened", [])  # the base is a frozen dataclass
        return watched

    def open(self, file: File) -> IO[bytes]:
        self.opened[:] = [super().open(file)]
        return self.opened[0]

    def share(self, size: float) -> float:
        file = self.opened[0] if self.opened else None
        return 0.0 if file is None else 1.0 if file.closed else file.tell() / max(size, 1)


class Meter:
    """Bytes of an epoch's units that were read.

    Args:
        sources: opened sources.
        order: of the epoch.
    """

    def __init__(self, sources: list[Source], order: list[Unit]) -> None:
        self._sources, self._order = sources, order
        self._sizes = [_size(sources[unit.source], unit) for unit in order]
        for source in sources:
            if isinstance(source, Archive) and source.sequential:
                source.location = _Watched.of(source.location)

    @property
    def total(self) -> float | None:
        """Bytes of all units; None where a size is not known (a data set on the hub)."""
        return None if None in self._sizes else float(sum(size or 0 for size in self._sizes))

    def done(self, place: Place) -> float:
        """Bytes read once the document at a place is done."""
        before = float(sum(size or 0 for size in self._sizes[: place.unit]))
        unit, size = self._order[place.unit], self._sizes[place.unit] or 0
        source = self._sources[unit.source]
        if unit.member == WHOLE and isinstance(source, Archive) and isinstance(source.location, _Watched):
            return before + size * source.location.share(size)
        return before + size


def _size(source: Source, unit: Unit) -> float | None:
    if isinstance(source, Archive):
        return source.file.size if unit.member == WHOLE else source.file.size / max(len(source.members()), 1)
    return source.list[unit.member].size if isinstance(source, Files) else None


@contextmanager
def progress_bar(meter: Meter, limit: int | None) -> Iterator[Callable[[DatasetSummary, Place], None]]:
    """Shows a bar on stderr; yields what to call behind each document.

    Args:
        meter: knows the sizes.
        limit: of findings, where there is one.
    """
    columns: tuple[Any, ...] = (
        TextColumn("inspect"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0 if limit or meter.total else None, text="")

        def show(found: DatasetSummary, place: Place) -> None:
            findings, total = found.counts["findings"], meter.total
            shares = [findings / limit] if limit else []
            shares += [meter.done(place) / total] if total else []
            bar.update(task, completed=min(max(shares, default=0.0), 1.0), text=f"{findings:,} findings")

        yield show
