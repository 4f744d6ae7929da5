"""Some pairs of a split, for evaluation and for looking at the data: no tokens, no training state."""

from __future__ import annotations

from collections import defaultdict
from hashlib import blake2b
from typing import TYPE_CHECKING

from datamodules.records import SEVERITIES
from datamodules.stream.epoch_order import epoch_order, walk

if TYPE_CHECKING:
    from datamodules.stream.preprocessing import DocumentProcessor
    from datamodules.stream.splits import Split
    from datamodules.tasks import Pair

MAX_SCANNED = 50  #: pairs read per pair asked for, where a severity is rarer than that


def first_pairs(
    processor: DocumentProcessor, split: Split, task: str, limit: int, *, balanced: bool, seed: int
) -> list[Pair]:
    """Distinct pairs of the first documents of a split, in the order of epoch 0.

    Among the pairs of the documents read it is chance, fixed by the seed, which are taken: a document's findings lie
    category by category, and the first fifty of a large one are all of the same.

    Args:
        processor: opens sources and tasks.
        split: which.
        task: its name.
        limit: at most so many.
        balanced: equally many of each severity as far as the first :data:`MAX_SCANNED` times ``limit`` pairs have
            them; what is missing is filled up with the rest.
        seed: of the order.
    """
    chosen: dict[str, list[Pair]] = defaultdict(list)
    seen: set[str] = set()
    quota = -(-limit // len(SEVERITIES)) if balanced else limit
    for _, _, raw in walk(processor.sources, epoch_order(processor.sources, epoch=0, seed=seed)):
        assert raw is not None  # no cache was asked
        for pair in processor.pairs(raw, task, split):
            if pair.content not in seen:
                seen.add(pair.content)
                chosen[pair.severity if balanced else ""].append(pair)
        full = sum(min(len(pairs), quota) for pairs in chosen.values())
        if full >= limit or len(seen) >= MAX_SCANNED * limit:
            break
    for pairs in chosen.values():
        pairs.sort(key=lambda pair: blake2b(f"{seed} {pair.content}".encode(), digest_size=8).digest())
    first = [pair for pairs in chosen.values() for pair in pairs[:quota]]
    rest = [pair for pairs in chosen.values() for pair in pairs[quota:]]
    return (first + rest)[:limit]
