"""Histograms against NumPy, sums over rows by hand, and the report."""

import json

import numpy as np
import pytest

from datamodules.findings import FindingsDataModule
from datamodules.packing import Row
from datamodules.statistics.near_duplicates import NearDuplicates
from datamodules.statistics.summary import DatasetSummary, Histogram, PackingStatistics, report_counts
from tests.helpers.findings_data import example


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_a_histogram_has_numpys_percentiles(size):
    values = np.random.default_rng(size).integers(0, 300, size)
    histogram = Histogram()
    for part in np.array_split(values, 3):
        histogram.add(part)
    got = histogram.summary()
    if not size:
        assert set(got.values()) == {0}
        return
    expected = np.percentile(values, [50, 90, 95, 99], method="inverted_cdf")
    assert [got[f"p{p}"] for p in (50, 90, 95, 99)] == expected.tolist()
    assert got["max"] == values.max()
    assert got["mean"] == pytest.approx(values.mean(), abs=0.05)


def rows():
    a, b = example((1, 7, 10), (11, 2), findings=3), example((1, 7, 20, 21), (22, 2))
    return [Row([a, b], prefix_length=2), Row([b])]


def test_packing_statistics_are_sums_over_rows():
    statistics = PackingStatistics(20)
    statistics.add(rows()[:1])
    statistics.add(rows()[1:])
    assert (statistics.rows, statistics.examples, statistics.findings, statistics.supervised) == (2, 3, 5, 6)
    assert statistics.used_tokens == 2 + 3 + 4 + 6
    assert statistics.unpacked_tokens == 5 + 6 + 6
    assert statistics.summary() == {
        "rows": 2, "tokens": 40, "efficiency": 15 / 40, "padding": 25 / 40, "supervised": 6 / 40, "prefix_saved": 2,
        "prefix_saved_share": pytest.approx(2 / 17),
    }  # fmt: skip


def test_packing_statistics_of_no_rows_are_zero():
    summary = PackingStatistics(20).summary()
    assert summary.pop("prefix_saved_share") == 1.0
    assert set(summary.values()) == {0}


@pytest.fixture
def data():
    return FindingsDataModule(["absent"], "absent", {"risk": 1.0, "triage": 1.0}, packing="packed", sequence_length=20)


def test_the_report_names_every_task_and_split(data, monkeypatch):
    monkeypatch.setattr(type(data), "tasks", {"risk": None, "triage": None})
    summary = DatasetSummary(near=NearDuplicates(2))
    summary.packed = {mode: PackingStatistics(20) for mode in ("none", "packed", "shared_prefix")}
    summary.packed["packed"].add([Row(row.examples) for row in rows()])
    summary.packed["shared_prefix"].add(rows())
    summary.counts.update(records=9, findings=7, duplicates=2)
    summary.examples.update(risk=3)
    summary.quarantine.update(["no title", "no title", "not an object"])
    summary.splits["val"].update(findings=1, examples=1)
    summary.lengths["risk"]["total"].add(np.array([5, 6, 6]))
    report = report_counts(summary, data)
    assert json.loads(json.dumps(report)) == report
    assert report["records"]["total"] == 9
    assert report["quarantined"] == 3
    assert list(report["quarantine"]) == ["no title", "not an object"]
    assert report["examples"] == {"risk": 3, "triage": 0}
    assert report["overflow"] == {"risk": 0, "triage": 0}
    assert report["splits"]["val"] == {"findings": 1, "correlations": 0, "examples": 1}
    assert report["lengths"]["risk"]["total"]["p50"] == 6
    assert report["tokens"] == {"total": 17, "supervised": 6, "prompt": 11, "prefix_saved": 2}
    assert report["packing"]["mode"] == "packed"
    assert report["packing"]["efficiency"] == 17 / 40
    assert report["near_duplicates"]["looked_at"] == 0
