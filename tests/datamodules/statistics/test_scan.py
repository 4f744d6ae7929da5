"""The survey, held against the data module's own batches and against counts by hand."""

import json

import numpy as np
import pytest

from datamodules.batch import IGNORE_INDEX
from datamodules.findings import FindingsDataModule
from datamodules.statistics.scan import MODES, scan_dataset
from datamodules.statistics.summary import Histogram, report_counts
from datamodules.synthetic import synthesize

TASKS = {"risk": 1.0, "correlation": 0.5, "summary": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("survey") / "shards"
    synthesize(path, findings=240, seed=5, findings_per_shard=80)
    return path


@pytest.fixture
def module(folder, tiny_mistral):
    def build(**changes):
        arguments = {
            "sources": [str(folder)], "tokenizer": str(tiny_mistral), "task_weights": TASKS, "sequence_length": 12_000,
            "batch_size": 2, "packing": "packed", "val_fraction": 0.1, "test_fraction": 0.1, "block_findings": 100,
            "num_workers": 0,
            "prefetch_batches": 0,
        }  # fmt: skip
        return FindingsDataModule(**{**arguments, **changes})

    return build


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"severity_balance": 0.7, "balance_by": "both"},
        {"conflicts": "drop", "task_weights": {"risk": 1.5, "remediation": 0.3}},
        {"conflicts": "merge", "task_weights": {"risk": 1.0}, "sequence_length": 2600},
    ],
)
def test_every_mode_has_the_rows_that_training_gets(module, folder, changes):
    changes = {"sources": [str(folder), str(folder)], **changes}  # each example twice: duplicates matter
    found = scan_dataset(module(**changes))
    for mode in MODES:
        rows = used = supervised = findings = 0
        for batch in module(packing=mode, **changes).train_batches():
            segments_BT = batch.segment_ids_BT
            rows += int((segments_BT >= 0).any(1).sum())
            used += int((segments_BT >= 0).sum())
            supervised += int((batch.labels_BT != IGNORE_INDEX).sum())
            findings += batch.findings
        packed = found.packed[mode]
        assert (packed.rows, packed.used, packed.supervised, packed.findings) == (rows, used, supervised, findings)
        assert rows > 0
    assert found.packed["none"].apart == found.packed["none"].used
    assert found.packed["packed"].apart == found.packed["packed"].used
    assert found.packed["shared_prefix"].apart > found.packed["shared_prefix"].used


def test_counts_are_those_of_the_data_module(module, folder):
    data = module(sources=[str(folder), str(folder)], val_fraction=0, test_fraction=0)
    found = scan_dataset(data)
    list(data.train_batches())
    report = report_counts(found, data)
    assert report["records"]["findings"] == 480
    assert report["duplicates"] == data.counts["duplicates"] > 0
    assert report["conflicts"] == data.counts["conflicts"]
    assert report["examples"] == {task: data.counts[f"examples.{task}"] for task in TASKS}
    assert report["unsupervised_examples"] == 0
    json.dumps(report)
    for task, count in report["examples"].items():
        assert sum(report["severities"][task].values()) == sum(report["categories"][task].values()) == count
        assert int(found.lengths[task]["total"].counts.sum()) == count


def test_splits_add_up_and_figures_fit_together(module):
    data = module()
    found = scan_dataset(data)
    report = report_counts(found, data)
    assert sum(split["findings"] for split in report["splits"].values()) == 240
    assert sum(split["examples"] for split in report["splits"].values()) == sum(report["examples"].values())
    assert all(split["examples"] for split in report["splits"].values())
    assert report["tokens"]["total"] == report["tokens"]["prompt"] + report["tokens"]["supervised"]
    modes = report["packing"]["modes"]
    assert report["packing"]["efficiency"] == modes["packed"]["efficiency"] == 1 - modes["packed"]["padding"]
    assert report["tokens"]["prefix_saved"] == modes["shared_prefix"]["prefix_saved"] > 0
    assert modes["none"]["efficiency"] < modes["packed"]["efficiency"]
    assert found.sample is not None


def test_several_devices_need_rows_in_larger_multiples(module):
    assert scan_dataset(module(sequence_length=4000), devices=3).packed["packed"].rows % 6 == 0


def test_what_is_broken_is_counted_and_not_fatal(module, tmp_path):
    finding = {"title": "open port", "description": "22", "severity": "low", "risk_score": "12", "category": "network"}
    lines = [json.dumps({**finding, "title": f"open port {i}"}) for i in range(30)]
    lines += ["{", "17", '{"severity": "low"}']  # more than max_quarantine: a run would stop
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    found = scan_dataset(
        module(sources=[str(tmp_path / "bad.jsonl")], task_weights={"risk": 1.0}, val_fraction=0, test_fraction=0)
    )
    assert found.counts["findings"] == found.examples["risk"] == 30
    assert found.quarantine.total() == 3
    assert found.repairs["number_from_string"] == 30
    assert found.counts["records"] == 33


def test_examples_that_do_not_fit_are_counted_by_task(module):
    found = scan_dataset(module(sequence_length=2600))
    assert found.overflow["summary"] > 0
    assert found.examples["risk"] > 0
    assert found.lengths["summary"]["total"].summary()["max"] <= 2600
    # a run would refuse these rows; the survey says what is dropped
    data = module(sequence_length=700, task_weights={"risk": 1.0})
    assert scan_dataset(data).overflow["risk"] > 0
    assert report_counts(scan_dataset(data), data)["packing"]["efficiency"] == 0


def test_a_limit_stops_behind_the_document_that_reaches_it(module):
    found = scan_dataset(module(), limit=81)
    assert found.counts["findings"] == 160
    assert not found.complete
    assert scan_dataset(module(), limit=None).complete


def test_near_duplicates_are_found_among_distinct_findings(module, folder):
    near = scan_dataset(module(sources=[str(folder), str(folder)]), near_duplicates=1000).near
    assert near is not None
    assert 0 < near.looked_at <= 240


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
