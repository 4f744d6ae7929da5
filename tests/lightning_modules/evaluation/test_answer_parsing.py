"""Strict and lenient parsing of answers, and the ids, names and numbers in texts, by hand."""

import json
import math
from types import SimpleNamespace

import pytest

from datamodules.tasks import schemas
from datamodules.tasks.base import Pair
from lightning_modules.evaluation.answer_parsing import (
    as_number,
    embedded,
    extract_json,
    identifiers,
    named_ids,
    numbers,
    object_schema,
    parse,
    parse_answer,
    parse_as,
    strings,
    words,
)
from tests.helpers.answers import RISK, answer, parsed

OBJECT = schemas.closed({"a": schemas.number(0, 9)})


def test_parsing_is_strict_and_extraction_is_not():
    assert parse('{"a": 1}\n') == {"a": 1}
    for text in ("", "[1]", '{"a": 1} ok', "```json\n{}\n```", '{"a": NaN}', '{"a": 1', '"{}"', "\ud800"):
        assert parse(text) is None
    assert parse(extract_json('Sure! {"a": {"b": 2}} Bye', OBJECT)) == {"a": {"b": 2}}
    assert extract_json("no brace }", OBJECT) == ""
    assert extract_json("} {", OBJECT) == ""


def test_arrays_and_plain_text_are_objects_with_one_key():
    rules, sentence = schemas.array(schemas.text(9), 2), schemas.text(9)
    assert parse_as('["a"]', rules) == {"items": ["a"]}
    assert object_schema(rules) == schemas.closed({"items": rules})
    for other in ('{"a": 1}', '"a"', "", '["a"] ok', "\ud800"):
        assert parse_as(other, rules) is None
    assert extract_json('Here: ["a"] Bye', rules) == '["a"]'
    assert parse_as('{"a": 1}', sentence) == {"text": '{"a": 1}'}
    assert parse_as(" \n", sentence) is None
    assert extract_json(" Text. ", sentence) == " Text. "
    assert parse_as('{"a": 1}', OBJECT) == {"a": 1}
    assert object_schema(OBJECT) is OBJECT
    item = parse_answer(
        SimpleNamespace(answer_schema=sentence), Pair("t", "c", "Good.", "low", "", 1), "Too long it is"
    )
    assert (item.expected, item.answer, item.valid) == ({"text": "Good."}, {"text": "Too long it is"}, False)


def test_a_parsed_answer_has_both_parses_and_the_pair():
    good = answer()
    item = parsed(good, f"Sure: {json.dumps(good)}", content='{"id":"x"}', complete=False)
    assert (item.answer, item.extracted, item.valid, item.complete) == (None, good, False, False)
    assert (item.expected, item.severity, item.category, item.content) == (good, "low", "network", '{"id":"x"}')
    assert parsed(good, good).valid
    assert not parsed(good, good | {"risk_score": 101}).valid
    assert not parsed(good, good | {"more": 1}).valid


def test_an_expected_answer_that_is_not_json_is_an_error():
    with pytest.raises(ValueError, match="expected answer of a risk pair"):
        parse_answer(RISK, Pair("risk", "{}", "[]", "low", "", 1), "{}")


@pytest.mark.parametrize(
    ("value", "number"), [(1, 1.0), (0.5, 0.5), (True, None), ("1", None), (None, None), ([1], None), (math.inf, None),
                          (math.nan, None), (-3, -3.0)]
)  # fmt: skip
def test_only_finite_json_numbers_are_numbers(value, number):
    assert as_number(value) == number


def test_strings_and_ids_inside_json():
    value = {"id": "a", "x": {"finding_ids": ["b", {"deep": "c"}], "note": "d"}, "list": [{"ids": "e"}, "f", 1, None]}
    assert list(strings(value)) == ["a", "b", "c", "d", "e", "f"]
    assert list(named_ids(value)) == ["a", "b", "c", "e"]
    assert list(named_ids({"idea": "x", "identity": "y", "_id": "z"})) == ["z"]


def test_json_embedded_in_text():
    text = 'Data [all]: {"a":[1]} and {broken: 1} then [2, {"b": 3}] {'
    assert list(embedded(text)) == [{"a": [1]}, [2, {"b": 3}]]
    assert list(embedded("[" * 100_000)) == []


def test_separate_numbers_and_identifiers():
    assert numbers("port 4444, 0.5 of sha256, v1.2, -3; x_7 9%") == [4444, 0.5, -3, 9]
    text = "proc_12 and /etc/shadow. CVE-2024-1: well-known and_so 2024-01 sha256 /tmp/x-"
    assert identifiers(text) == ["proc_12", "/etc/shadow", "CVE-2024-1", "/tmp/x"]


def test_words_are_lower_case():
    assert words(["Port 22 is OPEN", "é-x"]) == ["port", "22", "is", "open", "é", "x"]
