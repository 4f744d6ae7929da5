"""In which order an epoch reads its documents, and where one is: a plan over members, not over records.

Members are permuted anew in every epoch; a block of some thousand findings is shuffled after that. A sequential archive
(a tar stream) goes in file order in epoch 0, so that the first batch does not wait for an index, and in permuted order
from epoch 1 on, when reading it once has left the index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from datamodules.sources import RawDocument, Source
    from datamodules.stream.token_cache import TokenCache

WHOLE = -1  #: member of a unit that is a whole source in file order


class Unit(NamedTuple):
    """A member of a source, or a whole sequential source (:data:`WHOLE`)."""

    source: int
    member: int


class Place(NamedTuple):
    """Where a document begins.

    Attributes:
        unit: index in the epoch's order.
        member: index of the member in its source.
        position: index of the first record in the member.
    """

    unit: int
    member: int
    position: int


def epoch_order(sources: Sequence[Source], *, epoch: int, seed: int) -> list[Unit]:
    """Units of an epoch, permuted by seed and epoch; the same in every process.

    Args:
        sources: opened sources.
        epoch: from 0.
        seed: of the run.
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
    sources: Sequence[Source], order: Sequence[Unit], start: Place | None = None, cache: TokenCache | None = None
) -> Iterator[tuple[Place, Unit, RawDocument | None]]:
    """Passes over an epoch's documents without parsing them.

    Args:
        sources: opened sources.
        order: of :func:`epoch_order`.
        start: where to begin; the epoch's beginning where None. Seeking reads no member before it.
        cache: where a unit's documents are all known to it, their source is not touched.

    Yields:
        Place, unit and raw document; None instead of the raw document where only the cache was asked.
    """
    start = start or Place(0, 0, 0)
    for index in range(start.unit, len(order)):
        unit, resumed = order[index], index == start.unit
        known = cache.documents(unit) if cache else None
        if known is not None:
            for member, position in known:
                if not resumed or (member, position) >= (start.member, start.position):
                    yield Place(index, member, position), Unit(unit.source, member), None
            continue
        source = sources[unit.source]
        if unit.member == WHOLE:
            raws = source.raw_documents((start.member, start.position) if resumed else (0, 0))
        else:
            raws = source.read_member(unit.member, start.position if resumed else 0)
        for raw in raws:
            yield Place(index, raw.member_index, raw.position), Unit(unit.source, raw.member_index), raw
