"""Near duplicates against the exact Jaccard indices of all pairs."""

import random

import pytest

from datamodules.statistics.near_duplicates import GRAM, THRESHOLD, NearDuplicates

TEXT = "A setuid binary was found at /usr/local/bin/helper owned by root and writable by the group staff"


def grams(text):
    data = text.encode()
    return {data[i : i + GRAM] for i in range(max(len(data) - GRAM + 1, 1))}


def jaccard(one, other):
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


def families(count, members, seed=0):
    """Texts of 400 letters and 3 digits; members of a family differ only in the digits."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        stem = "".join(rng.choices("abcdefghijklmnop", k=400))
        texts += [stem + "".join(rng.choices("0123456789", k=3)) for _ in range(members)]
    return list(dict.fromkeys(texts))


def test_families_are_those_of_the_exact_comparison():
    texts = families(20, 5)
    exact = sum(any(jaccard(text, before) >= THRESHOLD for before in texts[:i]) for i, text in enumerate(texts))
    assert exact == len(texts) - 20
    near = NearDuplicates(1000)
    for text in texts:
        near.add(text, "train")
    assert near.looked_at == len(texts)
    assert abs(near.near - exact) <= 4  # an estimate from 64 permutations
    assert near.leaked == {"val": 0, "test": 0}


@pytest.mark.parametrize("order", [("train", "val", "val", "test"), ("val", "val", "test", "train")])
def test_a_leak_is_counted_in_either_order(order):
    near = NearDuplicates(10)
    for number, split in enumerate(order):
        near.add(f"{TEXT} {TEXT} {TEXT.upper()} {number}", split)
    assert near.leaked == {"val": 2, "test": 1}
    assert near.near == 1  # the second one of validation; the others are the first ones of their split


def test_different_texts_and_held_out_families_are_no_leak():
    near = NearDuplicates(10)
    near.add(TEXT, "train")
    near.add("an entirely different sentence about kernel parameters and forwarding", "val")
    near.add("an entirely different sentence about kernel parameters and forwardinG", "test")
    assert near.leaked == {"val": 0, "test": 0}
    assert near.near == 0


def test_the_limit_is_reported():
    near = NearDuplicates(2)
    for text in ("", "x", "y"):  # shorter than a gram
        near.add(text, "train")
    assert near.full
    assert near.summary() == {
        "looked_at": 2, "near": 0, "threshold": THRESHOLD, "leaked": {"val": 0, "test": 0}, "complete": False,
    }  # fmt: skip
