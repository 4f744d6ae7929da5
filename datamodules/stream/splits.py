"""Train, validation and test split by a hash of the model's input.

The key does not contain the id: in a real shard of 1,010 findings only 782 have distinct inputs, and a split by id
would put copies of one input into two splits. The same key is in the same split in every file, run and process.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import orjson

from datamodules.errors import UserError
from datamodules.records import Document
from datamodules.tasks.base import sanitize

if TYPE_CHECKING:
    from datamodules.records import Correlation, Finding

Split: TypeAlias = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_MASK = (1 << 64) - 1


def input_key(finding: Finding) -> int:
    """Returns a 64-bit digest of category, title, description and metadata (keys sorted).

    The probability that any two of a billion inputs collide is 3 %; a collision drops one example as a duplicate.
    """
    record = [finding.category, finding.title, finding.description, finding.metadata]
    try:
        data = orjson.dumps(record, default=str, option=orjson.OPT_SORT_KEYS)
    except (TypeError, ValueError):  # see datamodules.tasks.base.compact_json
        data = orjson.dumps(sanitize(record), default=str, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def split_of(key: int, *, val_fraction: float, test_fraction: float, seed: int) -> Split:
    """Returns the split of a key.

    The key is hashed to a number in [0, 1): below ``test_fraction`` is test, below the sum of both is validation.

    Args:
        key: 64-bit key of :func:`input_key`.
        val_fraction: fraction of validation, 0..1.
        test_fraction: fraction of test, 0..1.
        seed: another seed gives an independent split.
    """
    share = _mix(key ^ _mix(seed & _MASK)) / 2**64
    return "test" if share < test_fraction else "val" if share < test_fraction + val_fraction else "train"


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Checks that the fractions of the held-out splits leave findings to train on.

    Raises:
        UserError: they don't.
    """
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise UserError(
            f"data.init_args: val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing to train on. "
            "Fix: set both to 0 or more, with a sum below 1"
        )


def split_document(
    document: Document, *, val_fraction: float, test_fraction: float, seed: int
) -> dict[Split, Document]:
    """Divides a document's findings into one document per split.

    A correlation is in the split of its first finding and loses the findings of other splits. A correlation without
    any present finding stays in train unchanged, so that a task counts it. Summaries and actions describe all
    findings: they are kept only if one split has all findings.

    Args:
        document: findings of any split; it is not changed.
        val_fraction: fraction of validation, 0..1.
        test_fraction: fraction of test, 0..1.
        seed: seed of the split.

    Returns:
        A document for each split; it may be empty.

    Raises:
        UserError: the fractions leave nothing to train on.
    """
    check_fractions(val_fraction, test_fraction)
    parts = {name: Document(document.source, document.member, document.position) for name in SPLITS}
    split_by_id: dict[str, Split] = {}
    for finding in document.findings:
        split = split_of(input_key(finding), val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
        parts[split].findings.append(finding)
        split_by_id.setdefault(finding.id, split)
    for correlation in document.correlations:
        split, part = _split_correlation(correlation, split_by_id)
        parts[split].correlations.append(part)
    for part_document in parts.values():
        if document.findings and len(part_document.findings) == len(document.findings):
            part_document.summaries, part_document.actions = document.summaries, document.actions
    return parts


def _split_correlation(correlation: Correlation, split_by_id: dict[str, Split]) -> tuple[Split, Correlation]:
    """Returns the split of a correlation, and the correlation without findings of other splits."""
    splits = [split_by_id.get(finding_id) for finding_id in correlation.finding_ids]
    first = next((split for split in splits if split), None)
    if first is None:
        return "train", correlation
    if all(split == first for split in splits):
        return first, correlation
    kept = [finding_id for finding_id, split in zip(correlation.finding_ids, splits, strict=True) if split == first]
    return first, replace(correlation, finding_ids=kept)


def _mix(value: int) -> int:
    """Mixes 64 bits by SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
