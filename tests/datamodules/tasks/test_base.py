import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.tasks.base import (
    MAX_CONTENT,
    MAX_DEPTH,
    SYSTEM,
    compact_json,
    finding_content,
    round_number,
    sanitize,
    truncate,
    truncate_values,
)
from tests.helpers.tasks_data import make_finding


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [nested(900), 10**30, -(10**30), 10**400, "\ud800", {1: 2}, b"\xff", (1, 2), float("nan"), {"a": {1, 2}}]
)
def test_compact_json_is_valid_for_any_value(value):
    json.loads(compact_json({"value": value}))


def test_compact_json_has_no_spaces_and_does_not_escape_non_ascii_text():
    assert compact_json({"a": [1, "ü €"], "b": None, "c": math.inf}) == '{"a":[1,"ü €"],"b":null,"c":null}'


def test_sanitize_replaces_only_what_json_cannot_hold():
    valid = {"a": [1, 2.5, None, True, "x"], "b": {"c": 2**63}}
    assert sanitize(valid) == valid
    assert sanitize({"i": 10**30, "huge": 10**400, "s": "\ud800", 7: (1,)}) == {
        "i": 1e30, "huge": str(10**400)[:64], "s": "?", "7": [1],
    }  # fmt: skip


def test_sanitize_bounds_the_depth():
    value = sanitize(nested(900))
    depth = 0
    while isinstance(value, list):
        (value,) = value
        depth += 1
    assert (depth, value) == (MAX_DEPTH, "…")


def test_round_number_keeps_two_decimals_and_drops_a_zero_fraction():
    assert [compact_json(round_number(x)) for x in (70.0, 33.336, 0.004, 99.999, -0.0)] == [
        "70", "33.34", "0", "100", "0",
    ]  # fmt: skip


def test_truncate_cuts_at_a_near_space_or_inside_a_word():
    assert truncate("short", 5) == "short"
    assert truncate("one two three four", 16) == "one two three…"
    assert truncate("x" * 50, 10) == "x" * 9 + "…"


@given(st.text(), st.integers(2, 40))
def test_truncate_never_exceeds_the_length(text, length):
    short = truncate(text, length)
    assert len(short) <= length
    assert short == text or text.startswith(short.removesuffix("…"))


def test_truncate_values_bounds_fields_keys_and_values():
    metadata = {"k" * 100: "v" * 100, "port": 22, "list": list(range(100)), "fourth": 1}
    short = truncate_values(metadata, 3, 10)
    assert list(short) == ["k" * 63 + "…", "port", "list"]
    assert short["port"] == 22
    assert short["list"] == "[0,1,2,3,…"
    assert short["k" * 63 + "…"] == "v" * 9 + "…"


def test_padding_does_not_push_a_finding_out_of_the_prompt():
    pads = {"pad": "A" * 10**6, "many": list(range(10**5)), "k" * 10**5: 1, **{f"x{i}": "B" * 9000 for i in range(100)}}
    finding = make_finding(1, title="T" * 10**5, metadata={"pid": 5, **pads})
    content = finding_content(finding)
    assert len(content) < MAX_CONTENT
    assert json.loads(content)["metadata"]["pid"] == 5
    assert json.loads(content)["title"].startswith("TTTT")
    not_truncated = make_finding(1, metadata={"cmd": "A" * 5000})
    assert json.loads(finding_content(not_truncated))["metadata"]["cmd"] == "A" * 5000


def test_finding_content_puts_leading_fields_first():
    content = json.loads(finding_content(make_finding(1), severity="low"))
    assert list(content) == ["severity", "title", "description", "category", "metadata"]


def test_the_system_text_is_one_line():
    assert "\n" not in SYSTEM
