"""Packed bytes to JSON values: bounded decompression, and a strict parser with a tolerant one behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import orjson
import zstandard
from isal import isal_zlib

from datamodules.sources.field_coercion import DuplicateKeys, InvalidRecord

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
GZIP_ERROR: Any = isal_zlib.error  # its stub says an instance


@dataclass(frozen=True)
class Limits:
    """What a member may unpack to.

    Attributes:
        member_bytes: bytes of one document, after decompression.
        ratio: decompressed over compressed bytes; real shards have 13, a bomb about 1,000.
        ratio_floor: output bytes below which the ratio is not looked at (small files compress oddly).
    """

    member_bytes: int = 1 << 30
    ratio: float = 200.0
    ratio_floor: int = 32 << 20


LIMITS = Limits()


def inflate(data: bytes, limits: Limits = LIMITS) -> bytes:
    """Unpacks gzip (several members too) or Zstandard data in bounded pieces.

    Raises:
        Refused: truncated or damaged data, or more output than ``limits`` allow.
    """
    try:
        return _inflate_zstd(data, limits) if data.startswith(ZSTD_MAGIC) else _inflate_gzip(data, limits)
    except (GZIP_ERROR, zstandard.ZstdError) as error:
        raise InvalidRecord("bad_compression", str(error)) from None


def _inflate_gzip(data: bytes, limits: Limits) -> bytes:
    pieces: list[bytes] = []
    size, rest = 0, data
    # one call does for an honest shard; the bound keeps a bomb's first piece small
    piece_bytes = max(1 << 16, min(24 * len(data), 1 << 26))
    while rest:
        inflater = isal_zlib.decompressobj(31)
        while not inflater.eof:
            piece = inflater.decompress(rest, piece_bytes)
            rest = inflater.unconsumed_tail
            size += len(piece)
            check_size(size, len(data), limits)
            pieces.append(piece)
            if not rest and not piece and not inflater.eof:
                raise InvalidRecord("truncated_gzip", f"ends after {size} bytes of output")
        rest = inflater.unused_data.lstrip(b"\0")  # zero padding may follow the last member
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _inflate_zstd(data: bytes, limits: Limits) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data, read_across_frames=True)
    pieces: list[bytes] = []
    size = 0
    while piece := reader.read(1 << 20):
        size += len(piece)
        check_size(size, len(data), limits)
        pieces.append(piece)
    return b"".join(pieces)


def check_size(size: int, packed: int, limits: Limits) -> None:
    """Raises ``InvalidRecord`` where ``size`` bytes of output from ``packed`` bytes of input are too many."""
    if size > limits.member_bytes:
        raise InvalidRecord("too_large", f"more than {limits.member_bytes} bytes uncompressed")
    if size > limits.ratio_floor and size > limits.ratio * packed:
        raise InvalidRecord("decompression_bomb", f"{packed} bytes unpack to more than {limits.ratio:g} times as many")


def loads(data: bytes) -> tuple[Any, bool]:
    """Parses JSON; the flag says whether it was strict JSON without a key that stands twice in its object.

    The strict parser keeps the last of two equal keys silently. So colons are counted before and after: one follows
    each key, and those inside strings stand on both sides (written as an escape, they only cost the tolerant parser).

    Raises:
        Refused: no JSON even for the tolerant parser.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        value = orjson.loads(data)
        if orjson.dumps(value).count(b":") == data.count(b":"):
            return value, True
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        pass
    try:
        text = data.decode("utf-8", "surrogateescape")
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer), False
    except RecursionError:
        raise InvalidRecord("too_deep", "nested too deep for a parser") from None
    except ValueError as error:
        reason = "empty" if not data.strip() else "bad_json"
        raise InvalidRecord(reason, str(error)) from None


def _integer(text: str) -> int | float:
    """An integer of 64 bits, or a float where it is larger, as the strict parser reads them."""
    value = int(text) if len(text) <= 20 else None
    return value if value is not None and -(2**63) <= value < 2**64 else float(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else DuplicateKeys(value)
