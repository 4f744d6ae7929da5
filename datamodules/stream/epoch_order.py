"""Order in which an epoch reads its documents, and positions in that order.

The order is a permutation of members (files, or members of an archive), not of records. Members are permuted again in
every epoch, and a block of some thousand findings is shuffled after that. A sequential archive (a tar stream) is read
in file order in epoch 0, so that the first batch does not wait for an index, and in permuted order from epoch 1 on,
because the first pass has written the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from datamodules.sources import RawDocument, Source

WHOLE = -1  #: member index of a unit that is a whole source in file order


class Unit(NamedTuple):
    """A member of a source, or a whole sequential source (:data:`WHOLE`)."""

    source: int
    member: int


class Place(NamedTuple):
    """Start of a document in an epoch's order.

    Attributes:
        unit: index in the epoch's order.
        member: index of the member in its source.
        position: index of the first record in the member.
    """

    unit: int
    member: int
    position: int


#: Returns member and position of each document of a unit, or None if some are unknown
KnownDocuments = Callable[[Unit], Sequence[tuple[int, int]] | None]


def epoch_order(sources: Sequence[Source], *, epoch: int, seed: int) -> list[Unit]:
    """Returns the units of an epoch, permuted by seed and epoch; the same in every process.

    Args:
        sources: opened sources.
        epoch: from 0.
        seed: seed of the run.
    """
    units = []
    for index, source in enumerate(sources):
        if source.sequential and epoch == 0:
            units.append(Unit(index, WHOLE))
        else:
            units += [Unit(index, member) for member in range(len(source.members()))]
    permutation = np.random.default_rng([seed, epoch]).permutation(len(units))
    return [units[i] for i in permutation]


def walk(
    sources: Sequence[Source],
    order: Sequence[Unit],
    start: Place | None = None,
    known_documents: KnownDocuments | None = None,
) -> Iterator[tuple[Place, Unit, RawDocument | None]]:
    """Iterates over an epoch's documents without parsing them.

    Args:
        sources: opened sources.
        order: result of :func:`epoch_order`.
        start: first document; None starts at the beginning of the epoch. No member before it is read.
        known_documents: lists the documents of units that a cache holds; their source is not read.

    Yields:
        Place, unit and raw document; None instead of the raw document if its unit is a known one.
    """
    start = start or Place(0, 0, 0)
    for index in range(start.unit, len(order)):
        unit, resumed = order[index], index == start.unit
        known = known_documents(unit) if known_documents else None
        if known is not None:
            for member, position in known:
                if not resumed or (member, position) >= (start.member, start.position):
                    yield Place(index, member, position), Unit(unit.source, member), None
            continue
        source = sources[unit.source]
        if unit.member == WHOLE:
            raw_documents = source.raw_documents((start.member, start.position) if resumed else (0, 0))
        else:
            raw_documents = source.read_member(unit.member, start.position if resumed else 0)
        for raw in raw_documents:
            yield Place(index, raw.member_index, raw.position), Unit(unit.source, raw.member_index), raw
