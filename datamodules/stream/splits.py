"""Train, validation and test by a hash of what the model would read.

The key leaves the id out: in a real shard of 1,010 findings only 782 have distinct inputs, and a split by id would put
copies of one input on two sides. The same key in another file, another run or another process is on the same side.
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
    """Digests category, title, description and metadata (keys sorted) to 64 bits.

    Two of a billion inputs collide with a probability of 3 %, which would cost one wrong duplicate.
    """
    record = [finding.category, finding.title, finding.description, finding.metadata]
    try:
        data = orjson.dumps(record, default=str, option=orjson.OPT_SORT_KEYS)
    except (TypeError, ValueError):  # see compact_json
        data = orjson.dumps(sanitize(record), default=str, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def split_of(key: int, *, val_fraction: float, test_fraction: float, seed: int) -> Split:
    """Draws a side from a key: below ``test`` test, below ``test + val`` validation, else train.

    Args:
        key: 64 bits, of :func:`input_key`.
        val_fraction: share of validation, 0..1.
        test_fraction: share of test, 0..1.
        seed: another seed, another split.
    """
    share = _mix(key ^ _mix(seed & _MASK)) / 2**64
    return "test" if share < test_fraction else "val" if share < test_fraction + val_fraction else "train"


def split_document(
    document: Document, *, val_fraction: float, test_fraction: float, seed: int
) -> dict[Split, Document]:
    """Deals a document's findings to three documents.

    A correlation goes where its first finding goes and loses the findings of other sides; one whose findings are all
    absent stays in train as it is, so that a task counts it. Summaries and actions speak of all findings: they stay
    only where one side holds them all.

    Args:
        document: findings of any sides; it is not changed.
        val_fraction: share of validation, 0..1.
        test_fraction: share of test, 0..1.
        seed: seed of the split.

    Returns:
        A document per split, empty ones too.

    Raises:
        UserError: the shares leave nothing to train on.
    """
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise UserError(
            f"data.init_args: val_fraction={val_fraction} and test_fraction={test_fraction} must be shares >= 0 "
            "with a sum below 1"
        )
    parts = {name: Document(document.source, document.member, document.position) for name in SPLITS}
    side_of: dict[str, Split] = {}
    for finding in document.findings:
        side = split_of(input_key(finding), val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
        parts[side].findings.append(finding)
        side_of.setdefault(finding.id, side)
    for correlation in document.correlations:
        side, part = _place(correlation, side_of)
        parts[side].correlations.append(part)
    for part_document in parts.values():
        if document.findings and len(part_document.findings) == len(document.findings):
            part_document.summaries, part_document.actions = document.summaries, document.actions
    return parts


def _place(correlation: Correlation, side_of: dict[str, Split]) -> tuple[Split, Correlation]:
    sides = [side_of.get(finding_id) for finding_id in correlation.finding_ids]
    first = next((side for side in sides if side), None)
    if first is None:
        return "train", correlation
    if all(side == first for side in sides):
        return first, correlation
    kept = [finding_id for finding_id, side in zip(correlation.finding_ids, sides, strict=True) if side == first]
    return first, replace(correlation, finding_ids=kept)


def _mix(value: int) -> int:
    """Stirs 64 bits: SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
