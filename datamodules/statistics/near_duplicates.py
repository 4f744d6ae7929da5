"""Near duplicates of findings, and what of them would leak from train to validation or test.

Two findings are near when their texts share a great part of their 5-grams of bytes (Jaccard index), estimated by
MinHash with locality-sensitive hashing (Broder 1997; ``datasketch``). Findings are gathered greedily: each joins the
first finding of its split that it is near to, and only those are kept, so a family of ten thousand costs one entry.
"""

from __future__ import annotations

import zlib
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.stream.splits import Split

THRESHOLD = 0.9  #: Jaccard index from which two texts are near
PERMUTATIONS = 64  #: the estimate's standard error at the threshold is sqrt(0.9 * 0.1 / 64) = 0.04
GRAM = 5  #: bytes
SCHEME = "affine32"  #: permutations of 32-bit hashes


class NearDuplicates:
    """Counts near duplicates among distinct texts, in memory bounded by ``limit``.

    Args:
        limit: texts to look at; those that come later are not counted.

    Attributes:
        looked_at: texts compared.
        near: of them, how many are near to an earlier one of their own split.
    """

    def __init__(self, limit: int) -> None:
        from datasketch import MinHashLSH

        self.limit, self.looked_at, self.near = limit, 0, 0
        self._index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
        self._kept: list[tuple[Split, Any]] = []
        self._members: Counter[int] = Counter()
        self._leaking: set[int] = set()

    @property
    def full(self) -> bool:
        """Whether ``limit`` is reached."""
        return self.looked_at >= self.limit

    @property
    def leaked(self) -> dict[str, int]:
        """Held-out texts, by split, that are near to a training text."""
        counts: Counter[str] = Counter()
        for index in self._leaking:
            counts[self._kept[index][0]] += self._members[index]
        return {"val": counts["val"], "test": counts["test"]}

    def add(self, text: str, split: Split) -> None:
        """Compares a text with those before it; it must not be equal to one of them."""
        if self.full:
            return
        self.looked_at += 1
        sketch = _sketch(text)
        near = [i for i in self._index.query(sketch) if sketch.jaccard(self._kept[i][1]) >= THRESHOLD]
        own = next((i for i in sorted(near) if self._kept[i][0] == split), None)
        self.near += own is not None
        if own is None:
            own = len(self._kept)
            self._kept.append((split, sketch))
            self._index.insert(own, sketch, check_duplication=False)
        self._members[own] += 1
        for other in near:
            if split == "train" and self._kept[other][0] != "train":
                self._leaking.add(other)
            elif split != "train" and self._kept[other][0] == "train":
                self._leaking.add(own)

    def summary(self) -> dict[str, Any]:
        """The figures, for a report."""
        return {
            "looked_at": self.looked_at, "near": self.near, "threshold": THRESHOLD, "leaked": self.leaked,
            "complete": not self.full,
        }  # fmt: skip


@cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(
        num_perm=PERMUTATIONS, scheme=SCHEME
    ).permutations  # shared by all sketches: making them costs more than using them


def _sketch(text: str) -> Any:
    from datasketch import MinHash

    data = text.encode("utf-8", "replace")
    grams = {data[i : i + GRAM] for i in range(max(len(data) - GRAM + 1, 1))}
    # CRC-32 is ten times faster than the library's SHA-1, and the library mixes the bits further
    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32, permutations=_permutations(), scheme=SCHEME)
    sketch.update_batch(list(grams))
    return sketch
