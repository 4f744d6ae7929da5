"""Faithfulness and word overlap by hand."""

import json
from types import SimpleNamespace

import pytest

from lightning_modules.evaluation.text_metrics import Faithfulness
from tests.helpers.answers import CORRELATION, parsed, results

SUMMARY = SimpleNamespace(name="summary", answer_schema={"properties": {"executive_summary": {"type": "string"}}})


def test_correlation_ids_and_inventions_by_hand():
    content = json.dumps({"findings": [{"id": "f1", "port": 4444}, {"id": "f2"}, {"id": "f3"}]})
    expected = {"related_finding_ids": ["f1", "f2"], "why": "Both use port 4444; 2 in all."}
    answered = {"related_finding_ids": ["f1", "f9"], "why": "Port 4444 and 5555, sha256."}
    items = [
        parsed(expected, answered, CORRELATION, content),
        parsed(expected, expected, CORRELATION, content),
        parsed(expected, "nonsense", CORRELATION, content),
    ]
    got = results(items, CORRELATION)
    assert "severity_accuracy" not in got
    assert got["ids_f1"] == pytest.approx(2 * 3 / (4 + 6))
    assert got["ids_invented"] == pytest.approx(1 / 4)
    assert got["numbers_invented"] == pytest.approx(1 / 4)  # of 4444, 5555; 4444, 2 (in the expected answer)
    assert got["faithful"] == pytest.approx(1 / 3)


def test_ids_in_json_inside_a_text_are_known():
    """A prompt of the agent is a text that contains JSON."""
    content = 'Data [all]: {"findings":[{"id":"f1"}]}\n\nTies:\n[{"id":"c1"}]\n\nKeys {a}: [1'
    expected = {"related_finding_ids": ["f1"]}
    item = parsed(expected, {"related_finding_ids": ["f1", "c1", "a"]}, CORRELATION, content)
    got = Faithfulness().count(item)
    assert (got["ids"], got["false_ids"]) == (3, 1)


@pytest.mark.parametrize(
    ("text", "ids", "false_ids", "false_numbers"),
    [
        ("2 findings: proc_12 is high.", 1, 0, 0),
        ("proc_13 reads /etc/shadow at 9.", 2, 2, 1),
        ("/tmp/x. Uses sha256 and/or IPv4, e.g. CVE-2024-1 on port 22.", 2, 1, 0),
        ("Nothing is named.", 0, 0, 0),
    ],
)
def test_every_number_and_name_of_a_summary_must_be_in_its_input(text, ids, false_ids, false_numbers):
    content = json.dumps({"findings": [{"id": "proc_12", "title": "Writable /tmp/x", "port": 22}, {"id": "f2"}]})
    item = parsed({"executive_summary": "2 findings."}, {"executive_summary": text}, SUMMARY, content)
    got = Faithfulness().count(item)
    assert (got["ids"], got["false_ids"], got["false_numbers"]) == (ids, false_ids, false_numbers)
    assert got["faithful"] is (false_ids + false_numbers == 0)


def test_word_overlap_is_rouge_1():
    items = [parsed({"why": "the port is open"}, {"why": "the open open gateway"}, CORRELATION)]
    assert results(items, CORRELATION)["word_overlap"] == pytest.approx(2 * 2 / 8)
