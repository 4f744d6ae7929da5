"""The scan against the data module's batches and against counts by hand."""

import json

import pytest

from datamodules.batch import IGNORE_INDEX
from datamodules.findings import FindingsDataModule
from datamodules.sources import parse
from datamodules.statistics.scan import MODES, scan_dataset
from datamodules.statistics.summary import report_counts
from datamodules.synthetic import synthesize

TASKS = {"risk": 1.0, "correlation": 0.5, "summary": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "shards"
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
def test_every_mode_has_the_rows_of_training(module, folder, changes):
    changes = {"sources": [str(folder), str(folder)], **changes}  # each example twice: duplicates matter
    summary = scan_dataset(module(**changes))
    for mode in MODES:
        rows = used = supervised = findings = 0
        for batch in module(packing=mode, **changes).train_batches():
            segments_BT = batch.segment_ids_BT
            rows += int((segments_BT >= 0).any(1).sum())
            used += int((segments_BT >= 0).sum())
            supervised += int((batch.labels_BT != IGNORE_INDEX).sum())
            findings += batch.findings
        packed = summary.packed[mode]
        assert (packed.rows, packed.used_tokens, packed.supervised, packed.findings) == (
            rows,
            used,
            supervised,
            findings,
        )
        assert rows > 0
    assert summary.packed["none"].unpacked_tokens == summary.packed["none"].used_tokens
    assert summary.packed["packed"].unpacked_tokens == summary.packed["packed"].used_tokens
    assert summary.packed["shared_prefix"].unpacked_tokens > summary.packed["shared_prefix"].used_tokens


def test_counts_are_those_of_the_data_module(module, folder):
    data = module(sources=[str(folder), str(folder)], val_fraction=0, test_fraction=0)
    summary = scan_dataset(data)
    list(data.train_batches())
    report = report_counts(summary, data)
    assert report["records"]["findings"] == 480
    documents = [parse(raw).document for source in data.document_processor.sources for raw in source.raw_documents()]
    with_rationale = sum(bool(finding.rationale) for document in documents for finding in document.findings)
    assert report["records"]["rationales"] == with_rationale > 0
    assert report["duplicates"] == data.counts["duplicates"] > 0
    assert report["conflicts"] == data.counts["conflicts"]
    assert report["examples"] == {task: data.counts[f"examples.{task}"] for task in TASKS}
    assert report["unsupervised_examples"] == 0
    json.dumps(report)
    for task, count in report["examples"].items():
        assert sum(report["severities"][task].values()) == sum(report["categories"][task].values()) == count
        assert int(summary.lengths[task]["total"].counts.sum()) == count


def test_splits_add_up_and_figures_agree(module):
    data = module()
    summary = scan_dataset(data)
    report = report_counts(summary, data)
    assert sum(split["findings"] for split in report["splits"].values()) == 240
    assert sum(split["examples"] for split in report["splits"].values()) == sum(report["examples"].values())
    assert all(split["examples"] for split in report["splits"].values())
    assert report["tokens"]["total"] == report["tokens"]["prompt"] + report["tokens"]["supervised"]
    modes = report["packing"]["modes"]
    assert report["packing"]["efficiency"] == modes["packed"]["efficiency"] == 1 - modes["packed"]["padding"]
    assert report["tokens"]["prefix_saved"] == modes["shared_prefix"]["prefix_saved"] > 0
    assert modes["none"]["efficiency"] < modes["packed"]["efficiency"]
    assert summary.sample is not None


def test_several_devices_need_rows_in_larger_multiples(module):
    assert scan_dataset(module(sequence_length=4000), devices=3).packed["packed"].rows % 6 == 0


def test_invalid_records_are_counted_and_not_fatal(module, tmp_path):
    finding = {"title": "open port", "description": "22", "severity": "low", "risk_score": "12", "category": "network"}
    lines = [json.dumps({**finding, "title": f"open port {i}"}) for i in range(30)]
    lines += ["{", "17", '{"severity": "low"}']  # more than max_quarantine: a run would stop
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    summary = scan_dataset(
        module(sources=[str(tmp_path / "bad.jsonl")], task_weights={"risk": 1.0}, val_fraction=0, test_fraction=0)
    )
    assert summary.counts["findings"] == summary.examples["risk"] == 30
    assert summary.quarantine.total() == 3
    assert summary.repairs["number_from_string"] == 30
    assert summary.counts["records"] == 33


def test_examples_that_do_not_fit_are_counted_by_task(module):
    summary = scan_dataset(module(sequence_length=2600))
    assert summary.overflow["summary"] > 0
    assert summary.examples["risk"] > 0
    assert summary.lengths["summary"]["total"].summary()["max"] <= 2600
    # a run would stop with an error; the scan reports the number of dropped examples
    data = module(sequence_length=700, task_weights={"risk": 1.0})
    assert scan_dataset(data).overflow["risk"] > 0
    assert report_counts(scan_dataset(data), data)["packing"]["efficiency"] == 0


def test_a_limit_stops_after_the_document_that_reaches_it(module):
    summary = scan_dataset(module(), limit=81)
    assert summary.counts["findings"] == 160
    assert not summary.complete
    assert scan_dataset(module(), limit=None).complete


def test_near_duplicates_are_found_among_distinct_findings(module, folder):
    near = scan_dataset(module(sources=[str(folder), str(folder)]), near_duplicates=1000).near
    assert near is not None
    assert 0 < near.looked_at <= 240


def test_documents_of_too_long_examples_belong_to_blocks_as_in_training(module, folder):
    changes = {"sequence_length": 2600, "block_findings": 30, "task_weights": {"summary": 1.0, "risk": 1.0}}
    summary = scan_dataset(module(**changes))
    data = module(**changes)
    rows = sum(int((batch.segment_ids_BT >= 0).any(1).sum()) for batch in data.train_batches())
    assert summary.overflow["summary"] > 0
    assert summary.packed["packed"].rows == rows > 0
