"""Counters: sums, the limit on invalid records, the quarantine file, and resuming."""

from collections import Counter

import orjson
import pytest

from datamodules.errors import UserError
from datamodules.sources import Quarantined
from datamodules.stream.counters import MIN_RECORDS_TO_CHECK, PipelineCounters
from datamodules.stream.epoch_order import Place
from datamodules.stream.example_columns import Columns
from datamodules.stream.preprocessing import PreparedDocument


def prepared(records=10, invalid=(), **counts):
    quarantined = [Quarantined("source", "member", index, reason, "text") for index, reason in enumerate(invalid)]
    return PreparedDocument(Place(0, 0, 0), Columns.of([]), records, Counter(counts), quarantined)


def test_counts_are_sums_over_documents():
    counters = PipelineCounters(1.0)
    counters.add(prepared(10, ["no title", "no title"], merged=1))
    counters.add(prepared(5, ["not an object"], merged=2))
    assert counters.counts == {
        "records": 15, "merged": 3, "quarantined": 3, "quarantined.no title": 2, "quarantined.not an object": 1,
    }  # fmt: skip
    assert counters.summary().startswith("records 15; ")
    assert "quarantined 3, no title 2, not an object 1" in counters.summary()


def test_the_limit_is_checked_at_the_end_and_after_enough_records():
    counters = PipelineCounters(0.1)
    counters.add(prepared(10, ["bad"] * 5))  # too few records for a reliable share
    with pytest.raises(
        UserError, match=r"max_quarantine=0\.1: 5 of 10 records can't be used: bad \(5\)\. Fix: set data"
    ):
        counters.check()
    counters = PipelineCounters(0.1)
    with pytest.raises(UserError, match="max_quarantine"):
        counters.add(prepared(MIN_RECORDS_TO_CHECK, ["bad"] * (MIN_RECORDS_TO_CHECK // 10 + 1)))
    counters = PipelineCounters(0.1)
    counters.add(prepared(MIN_RECORDS_TO_CHECK, ["bad"] * (MIN_RECORDS_TO_CHECK // 10)))
    counters.check()


def test_the_error_names_the_quarantine_file(tmp_path):
    counters = PipelineCounters(0.0, tmp_path / "bad.jsonl")
    counters.add(prepared(10, ["bad"]))
    with pytest.raises(UserError, match=r"see .*bad\.jsonl"):
        counters.check()


def test_resuming_truncates_the_file_and_continues_the_counters(tmp_path):
    path = tmp_path / "new" / "bad.jsonl"
    counters = PipelineCounters(1.0, path)
    counters.add(prepared(10, ["first"]))
    state = counters.state()
    counters.add(prepared(10, ["second"]))  # after the checkpoint
    counters.close()
    assert [orjson.loads(line)["reason"] for line in path.read_bytes().splitlines()] == ["first", "second"]
    resumed = PipelineCounters(1.0, path, state)
    resumed.add(prepared(10, ["second"]))
    resumed.close()
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["reason"] for line in lines] == ["first", "second"]
    assert lines[0] == {"source": "source", "member": "member", "position": 0, "reason": "first", "record": "text"}
    assert resumed.counts == counters.counts
    assert resumed.state() == counters.state()
