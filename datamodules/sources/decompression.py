"""Decodes compressed bytes to JSON values: bounded decompression, then a strict parser with a tolerant fallback."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import orjson
import zstandard
from isal import isal_zlib

from datamodules.sources.field_coercion import MAX_DEPTH, InvalidRecord

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
GZIP_ERROR: Any = isal_zlib.error  # isal's stub types it as an instance, not as a class


@dataclass(frozen=True)
class DecompressionLimits:
    """Limits on the size of decompressed data.

    Attributes:
        member_bytes: largest number of bytes of one document after decompression.
        ratio: largest ratio of decompressed to compressed bytes; real shards have 13, a decompression bomb about 1,000.
        ratio_floor: bytes of output below which the ratio is not checked (small files compress irregularly).
    """

    member_bytes: int = 1 << 30
    ratio: float = 200.0
    ratio_floor: int = 32 << 20


DEFAULT_LIMITS = DecompressionLimits()


class DuplicateKeys(dict[str, Any]):
    """A JSON object with a repeated key: it is unknown which of the values was meant."""


def inflate(data: bytes, limits: DecompressionLimits = DEFAULT_LIMITS) -> bytes:
    """Decompresses gzip (one or several members) or Zstandard data in bounded chunks.

    Raises:
        InvalidRecord: the data are truncated or damaged, or the output exceeds ``limits``.
    """
    try:
        return _inflate_zstd(data, limits) if data.startswith(ZSTD_MAGIC) else _inflate_gzip(data, limits)
    except (GZIP_ERROR, zstandard.ZstdError) as error:
        raise InvalidRecord("bad_compression", str(error)) from None


def _inflate_gzip(data: bytes, limits: DecompressionLimits) -> bytes:
    chunks: list[bytes] = []
    size, rest = 0, data
    # one call is enough for an ordinary shard; the bound keeps the first chunk of a decompression bomb small
    chunk_bytes = max(1 << 16, min(24 * len(data), 1 << 26))
    while rest:
        decompressor = isal_zlib.decompressobj(31)
        while not decompressor.eof:
            chunk = decompressor.decompress(rest, chunk_bytes)
            rest = decompressor.unconsumed_tail
            size += len(chunk)
            check_size(size, len(data), limits)
            chunks.append(chunk)
            if not rest and not chunk and not decompressor.eof:
                raise InvalidRecord("truncated_gzip", f"ends after {size} bytes of output")
        rest = decompressor.unused_data.lstrip(b"\0")  # zero padding may follow the last member
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _inflate_zstd(data: bytes, limits: DecompressionLimits) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data, read_across_frames=True)
    chunks: list[bytes] = []
    size = 0
    while chunk := reader.read(1 << 20):
        size += len(chunk)
        check_size(size, len(data), limits)
        chunks.append(chunk)
    return b"".join(chunks)


def check_size(size: int, compressed: int, limits: DecompressionLimits) -> None:
    """Checks the size of decompressed data against the limits.

    Args:
        size: bytes of output so far.
        compressed: bytes of input.
        limits: the limits.

    Raises:
        InvalidRecord: the output is larger than the limits allow.
    """
    if size > limits.member_bytes:
        raise InvalidRecord("too_large", f"more than {limits.member_bytes} bytes uncompressed")
    if size > limits.ratio_floor and size > limits.ratio * compressed:
        raise InvalidRecord(
            "decompression_bomb", f"{compressed} bytes unpack to more than {limits.ratio:g} times as many"
        )


def loads(data: bytes) -> tuple[Any, bool]:
    """Parses JSON.

    The strict parser (orjson) silently keeps the last value of a repeated key. Therefore the colons are counted in the
    text and in the parsed value's own text: one follows each key, and a colon inside a string is in both. (A colon that
    is written as an escape makes the counts differ; such a document is only parsed a second time.)

    Args:
        data: the text, with or without a UTF-8 byte order mark.

    Returns:
        The value, and whether the text was strict JSON without repeated keys. If not, objects with a repeated key are
        :class:`DuplicateKeys`, and :func:`strict_json_error` finds the other violations.

    Raises:
        InvalidRecord: the tolerant parser can't read the text either.
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


def is_json_object(line: bytes) -> bool:
    """Returns whether bytes are one JSON object."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def strict_json_error(value: Any) -> tuple[str, str] | None:
    """Finds the first violation of strict JSON in a value that the tolerant parser read.

    Args:
        value: a JSON value of :func:`loads`, or of a table.

    Returns:
        The violation as (reason, detail); None if there is none.
    """
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            return "too_deep", f"more than {MAX_DEPTH} levels"
        if isinstance(item, DuplicateKeys):
            return "duplicate_keys", ""
        if isinstance(item, dict):
            stack.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            stack.extend((part, depth + 1) for part in item)
        elif isinstance(item, float) and not math.isfinite(item):
            return "non_finite", str(item)
        elif isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
            return "invalid_utf8", ""
    return None


def _integer(text: str) -> int | float:
    """Parses an integer of 64 bits, or a float if it is larger, as the strict parser does."""
    value = int(text) if len(text) <= 20 else None
    return value if value is not None and -(2**63) <= value < 2**64 else float(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else DuplicateKeys(value)
