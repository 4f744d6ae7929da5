"""The schemas of the answers: closed, bounded, and limited to the supported keywords."""

import pytest

from datamodules.records import SEVERITIES
from datamodules.tasks import TASKS, build_tasks
from datamodules.tasks.agent_prompts import AGENT_TASKS
from datamodules.tasks.schemas import PRIORITIES, array, closed, correlation, is_valid, number, text

KEYWORDS = {
    "string": ({"type", "enum"}, {"type", "maxLength"}),
    "number": ({"type", "minimum", "maximum"},),
    "integer": ({"type", "minimum", "maximum"},),
    "array": ({"type", "items", "maxItems"},),
    "object": ({"type", "properties", "required", "additionalProperties"},),
}


def assert_supported(schema: dict) -> None:
    assert set(schema) in KEYWORDS[schema["type"]], schema
    if schema["type"] == "object":
        assert schema["additionalProperties"] is False
        assert set(schema["required"]) <= set(schema["properties"])
        for part in schema["properties"].values():
            assert_supported(part)
    if schema["type"] == "array":
        assert_supported(schema["items"])


@pytest.mark.parametrize("name", [*TASKS, *AGENT_TASKS])
@pytest.mark.parametrize("rationale", [False, True])
def test_every_schema_is_closed_and_bounded(name, rationale):
    assert_supported(build_tasks([name], rationale=rationale)[name].answer_schema)


def test_the_builders_accept_values_up_to_their_bounds():
    for schema, valid, wrong in (
        (text(3), "abc", "abcd"),
        (number(0, 1), 1, 1.01),
        (array(number(0, 1), 2), [0, 1], [0, 1, 0]),
        (closed({"a": number(0, 1)}), {"a": 0}, {}),
        (closed({"a": number(0, 1)}), {"a": 0}, {"a": 0, "b": 0}),
        (closed({"a": number(0, 1)}, required=[]), {}, {"a": 2}),
    ):
        assert is_valid(valid, schema)
        assert not is_valid(wrong, schema)


def test_a_correlation_refers_to_a_bounded_number_of_findings():
    answer = {"title": "t", "related_finding_ids": ["a", "b", "c"]}
    assert is_valid(answer, correlation(3))
    assert not is_valid(answer, correlation(2))


def test_every_severity_has_a_priority():
    assert tuple(PRIORITIES) == SEVERITIES
