"""Near duplicates of findings, and those of them that leak from train to validation or test.

Two findings are near duplicates if the Jaccard index of their 5-grams of bytes is high. It is estimated by MinHash with
locality-sensitive hashing (Broder 1997; ``datasketch``). Findings are clustered greedily: each joins the first finding
of its split that it is near to. Only these first findings are kept, so a cluster of ten thousand needs one entry.
"""

from __future__ import annotations

import zlib
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.stream.splits import Split

THRESHOLD = 0.9  #: Jaccard index from which two texts are near duplicates
PERMUTATIONS = 64  #: the estimate's standard error at the threshold is sqrt(0.9 * 0.1 / 64) = 0.04
GRAM = 5  #: length of a gram in bytes
SCHEME = "affine32"  #: name in datasketch of permutations of 32-bit hashes


class NearDuplicates:
    """Counts near duplicates among distinct texts, in memory bounded by ``limit``.

    Args:
        limit: largest number of texts to compare; later ones are not counted.

    Attributes:
        looked_at: number of texts compared.
        near: number of them that are near to an earlier one of their own split.
    """

    def __init__(self, limit: int) -> None:
        from datasketch import MinHashLSH

        self.limit, self.looked_at, self.near = limit, 0, 0
        self._index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
        self._first: list[tuple[Split, Any]] = []
        self._cluster_sizes: Counter[int] = Counter()
        self._leaking: set[int] = set()

    @property
    def full(self) -> bool:
        """Whether ``limit`` is reached."""
        return self.looked_at >= self.limit

    @property
    def leaked(self) -> dict[str, int]:
        """Number of held-out texts that are near to a training text, by split."""
        counts: Counter[str] = Counter()
        for index in self._leaking:
            counts[self._first[index][0]] += self._cluster_sizes[index]
        return {"val": counts["val"], "test": counts["test"]}

    def add(self, text: str, split: Split) -> None:
        """Compares a text with the earlier ones; it must differ from all of them."""
        if self.full:
            return
        self.looked_at += 1
        sketch = _sketch(text)
        near = [i for i in self._index.query(sketch) if sketch.jaccard(self._first[i][1]) >= THRESHOLD]
        own = next((i for i in sorted(near) if self._first[i][0] == split), None)
        self.near += own is not None
        if own is None:
            own = len(self._first)
            self._first.append((split, sketch))
            self._index.insert(own, sketch, check_duplication=False)
        self._cluster_sizes[own] += 1
        for other in near:
            if split == "train" and self._first[other][0] != "train":
                self._leaking.add(other)
            elif split != "train" and self._first[other][0] == "train":
                self._leaking.add(own)

    def summary(self) -> dict[str, Any]:
        """Returns the counts, for a report."""
        return {
            "looked_at": self.looked_at, "near": self.near, "threshold": THRESHOLD, "leaked": self.leaked,
            "complete": not self.full,
        }  # fmt: skip


@cache
def _permutations() -> Any:
    from datasketch import MinHash

    # shared by all sketches: computing the permutations takes longer than using them
    return MinHash(num_perm=PERMUTATIONS, scheme=SCHEME).permutations


def _sketch(text: str) -> Any:
    from datasketch import MinHash

    data = text.encode("utf-8", "replace")
    grams = {data[i : i + GRAM] for i in range(max(len(data) - GRAM + 1, 1))}
    # CRC-32 is ten times faster than the library's SHA-1, and the library mixes the bits further
    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32, permutations=_permutations(), scheme=SCHEME)
    sketch.update_batch(list(grams))
    return sketch
