"""Compares titles of findings with those of the training data, by character trigrams.

A model's answer about a kind of finding that it never saw is a guess. The measure is cheap: the Dice coefficient (Dice
1945) of the sets of character trigrams of a title and of the nearest training title. Numbers are replaced by one digit
first, so that "port 4444" equals "port 22".
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache

#: Titles below this similarity are marked. False alarms on two shards of sys-scan-graph's data set, one as training
#: data and the other held out: 13 of 5,010 findings (0.26 %, 3 of 131 titles) and 2 of 1,010 (0.20 %, 1 of 101).
MIN_SIMILARITY = 0.5
MAX_TITLE = 200  #: characters of a title that are compared
_NUMBER = re.compile(r"(?:0x)?\d[\d.:]*")


def shape(title: str) -> str:
    """Returns a title in lower case, with every number as "0" and single spaces."""
    return _NUMBER.sub("0", " ".join(title[:MAX_TITLE].lower().split()))


def trigrams(text: str) -> frozenset[str]:
    """Returns the character trigrams of a text, with a space at both ends."""
    padded = f" {text} "
    return frozenset(padded[i : i + 3] for i in range(len(padded) - 2))


class TitleIndex:
    """The titles of the training data.

    Args:
        titles: titles, or their shapes.
    """

    def __init__(self, titles: Iterable[str]) -> None:
        self.shapes = sorted({shape(title) for title in titles})
        self._sizes: list[int] = []
        self._places: dict[str, list[int]] = defaultdict(list)
        for place, text in enumerate(self.shapes):
            grams = trigrams(text)
            self._sizes.append(len(grams))
            for gram in grams:
                self._places[gram].append(place)
        self._similarity = lru_cache(maxsize=4096)(self._compare)

    def similarity(self, title: str) -> float:
        """Returns the similarity of a title and the nearest training title, 0..1; 1 for an equal shape."""
        return self._similarity(shape(title))

    def _compare(self, text: str) -> float:
        grams = trigrams(text)
        shared = Counter(place for gram in grams for place in self._places.get(gram, ()))
        return max((2 * count / (len(grams) + self._sizes[place]) for place, count in shared.items()), default=0.0)
