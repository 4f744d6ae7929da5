"""Decompression and JSON parsing: limits, bombs, damaged data, strict and tolerant JSON."""

import math
import tracemalloc

import pytest
import zstandard

from datamodules.sources.decompression import (
    DecompressionLimits,
    DuplicateKeys,
    check_size,
    inflate,
    is_json_object,
    loads,
    strict_json_error,
)
from datamodules.sources.field_coercion import InvalidRecord
from tests.helpers.sources_data import COMPRESSIONS, gzip_bytes


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 20) + 3])
def test_inflate_is_the_inverse_of_compression(suffix, size):
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert inflate(COMPRESSIONS[suffix](data)) == data


def test_inflate_reads_several_members_and_padding():
    assert inflate(gzip_bytes(b"one ") + gzip_bytes(b"two") + b"\0" * 512) == b"one two"
    compress = zstandard.ZstdCompressor().compress
    assert inflate(compress(b"one ") + compress(b"two")) == b"one two"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gzip_bytes(b"[]" * 99)[:-9], "truncated_gzip"),
        (gzip_bytes(b"[]" * 99)[:5], "truncated_gzip"),
        (b"\x1f\x8b" + bytes(40), "bad_compression"),
        (b"\x28\xb5\x2f\xfdnonsense", "bad_compression"),
    ],
)
def test_damaged_data_are_invalid(data, reason):
    with pytest.raises(InvalidRecord) as caught:
        inflate(data)
    assert caught.value.reason == reason


def test_a_bomb_is_decompressed_in_chunks():
    bomb = gzip_bytes(b" " * (256 << 20))
    tracemalloc.start()
    with pytest.raises(InvalidRecord, match="decompression_bomb"):
        inflate(bomb)
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


def test_the_limits_are_inclusive():
    limits = DecompressionLimits(member_bytes=1000, ratio=10, ratio_floor=100)
    check_size(1000, 100, limits)
    check_size(100, 1, limits)  # below the floor the ratio is not checked
    for size, compressed, reason in ((1001, 1000, "too_large"), (1000, 99, "decompression_bomb")):
        with pytest.raises(InvalidRecord) as caught:
            check_size(size, compressed, limits)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "value", "strict"),
    [
        (b'{"a": ":", "b:c": [1]}', {"a": ":", "b:c": [1]}, True),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}, True),
        (b'{"a": "\\u003a"}', {"a": ":"}, False),  # an escaped colon only costs a second parse
        (b"[1, -9223372036854775808, 18446744073709551615]", [1, -(2**63), 2**64 - 1], True),
        (b'{"a": Infinity, "b": 123456789012345678901234567890}', {"a": math.inf, "b": 1.2345678901234568e29}, False),
        (b"[Infinity, 18446744073709551616, -9223372036854775809]", [math.inf, 2.0**64, -(2.0**63)], False),
        (b'["\xff"]', ["\udcff"], False),
        (b'["\\ud800"]', ["\ud800"], False),
    ],
)
def test_loads_reports_whether_the_text_was_strict(text, value, strict):
    assert loads(text) == (value, strict)
    assert repr(loads(text)[0]) == repr(value)  # integers and floats are not mixed up


def test_loads_marks_objects_with_repeated_keys():
    value, strict = loads(b'{"a": {"k": 1, "k": 2}, "b": {"k": 1}}')
    assert not strict
    assert (type(value), type(value["a"]), type(value["b"])) == (dict, DuplicateKeys, dict)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "bad_json"),
        (b"[" + b"9" * 5000 + b"] x", "bad_json"),
        (b"[" * 100_000, "too_deep"),
    ],
)
def test_text_that_is_not_json_is_invalid(text, reason):
    with pytest.raises(InvalidRecord) as caught:
        loads(text)
    assert caught.value.reason == reason


@pytest.mark.parametrize(("text", "expected"), [(b"{}", True), (b'{"a": 1}\r', True), (b"[]", False), (b"{", False)])
def test_objects_are_recognised(text, expected):
    assert is_json_object(text) == expected


def test_strict_json_error_finds_every_violation():
    assert strict_json_error({"a": [1, {"b": "\N{SNOWMAN}"}, None, True, 1.5]}) is None
    assert strict_json_error({"a": [math.nan]}) == ("non_finite", "nan")
    assert strict_json_error([{"a": -math.inf}]) == ("non_finite", "-inf")
    assert strict_json_error({"a": [DuplicateKeys(b=1)]}) == ("duplicate_keys", "")
    assert strict_json_error({"a": "\udcff"}) == ("invalid_utf8", "")
    assert strict_json_error({"\udcff": "a"}) == ("invalid_utf8", "")
    nested = "leaf"
    for _ in range(64):
        nested = [nested]
    assert strict_json_error(nested) is None
    assert strict_json_error([nested])[0] == "too_deep"
