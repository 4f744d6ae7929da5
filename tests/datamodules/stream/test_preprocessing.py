"""Documents to examples: splits, conflicts, counters, processes, and pairs."""

import os
import pickle

import pytest

from datamodules.errors import UserError
from datamodules.sources import open_source
from datamodules.stream.epoch_order import Place, Unit
from datamodules.stream.preprocessing import DocumentProcessor, first_pairs, take_skipped
from datamodules.stream.splits import SPLITS
from tests.helpers.findings_data import document, finding, write_shard

PLACE = Place(0, 0, 0)


@pytest.fixture
def build(mistral_tokenizer_folder, tmp_path):
    def build(findings, correlations=(), **changes):
        sources = write_shard(tmp_path / "shards", findings, correlations)
        options = {"tasks": ["risk"], "val_fraction": 0.2, "test_fraction": 0.1, "seed": 0} | changes
        return DocumentProcessor(sources=sources, tokenizer=mistral_tokenizer_folder, **options)

    return build


def raw_document(processor):
    (raw,) = processor.sources[0].raw_documents()
    return raw


def keys(prepared):
    return prepared.columns.keys.tolist()


def test_splits_share_no_example_and_count_all_records(build):
    processor = build([*(finding(n) for n in range(60)), "no finding"])
    parts = {split: processor.prepare(PLACE, raw_document(processor), split) for split in SPLITS}
    assert sum(len(part.columns) for part in parts.values()) == 60
    assert len({key for part in parts.values() for key in keys(part)}) == 60
    assert all(len(part.columns) > 0 for part in parts.values())
    assert {part.records for part in parts.values()} == {61}
    assert [len(part.quarantined) for part in parts.values()] == [1, 1, 1]


def test_examples_are_those_of_the_chat_format(build):
    processor = build([finding(n) for n in range(10)], tasks=["risk", "triage"], val_fraction=0, test_fraction=0)
    raw = raw_document(processor)
    prepared = processor.prepare(PLACE, raw, "train")
    expected = []
    for name, task in processor.tasks.items():
        expected += processor.chat.encode(task, processor.pairs(raw, name, "train"))
    got = prepared.columns.select(range(len(prepared.columns)))
    assert [(e.task, e.prompt_ids.tolist(), e.completion_ids.tolist()) for e in got] == [
        (e.task, e.prompt_ids.tolist(), e.completion_ids.tolist()) for e in expected
    ]
    assert {e.task for e in got} == {"risk", "triage"}


def test_conflicts_are_merged_only_on_request(build):
    findings = [finding(1), finding(1, "critical", id="other", risk_score=90.0, base_severity_score=90.0)]
    for conflicts, distinct in (("keep", 2), ("drop", 2), ("merge", 1)):
        processor = build(findings, conflicts=conflicts, val_fraction=0, test_fraction=0)
        prepared = processor.prepare(PLACE, raw_document(processor), "train")
        assert len(set(keys(prepared))) == distinct
        assert len(set(prepared.columns.inputs.tolist())) == 1
        assert prepared.counts["merged"] == (2 if conflicts == "merge" else 0)


def test_repairs_are_counted(build):
    processor = build([finding(n, risk_score="50") for n in range(4)], val_fraction=0, test_fraction=0)
    prepared = processor.prepare(PLACE, raw_document(processor), "train")
    assert prepared.counts["repaired.number_from_string"] == 4


def test_skipped_records_are_counted_once(build):
    correlation = {"id": "c1", "title": "t", "description": "d", "correlation_refs": ["absent"]}
    processor = build([finding(1)], [correlation], tasks=["correlation"], val_fraction=0, test_fraction=0)
    prepared = processor.prepare(PLACE, raw_document(processor), "train")
    assert sum(n for name, n in prepared.counts.items() if name.startswith("skipped.")) == 1
    assert take_skipped(processor.tasks["correlation"]) == {}


def test_a_copy_for_another_process_opens_everything_again(build):
    processor = build([finding(n) for n in range(10)])
    expected = keys(processor.prepare(PLACE, raw_document(processor), "train"))
    copy = pickle.loads(pickle.dumps(processor))
    assert copy.sources[0] is not processor.sources[0]
    assert copy.chat is not processor.chat
    assert keys(copy.prepare(PLACE, raw_document(copy), "train")) == expected


def test_a_forked_process_does_not_share_open_files(build, monkeypatch):
    processor = build([finding(1)])
    (source,) = processor.sources
    assert processor.sources[0] is source
    pid = os.getpid()
    monkeypatch.setattr("datamodules.stream.preprocessing.os.getpid", lambda: pid + 1)
    assert processor.sources[0] is not source


def test_a_document_can_be_read_again(build):
    processor = build([finding(n) for n in range(10)])
    raw = raw_document(processor)
    again = processor.read_again(Unit(0, 0), raw.position)
    assert keys(processor.prepare(PLACE, again, "train")) == keys(processor.prepare(PLACE, raw, "train"))


def test_no_source_is_an_error(build):
    processor = build([finding(1)])
    processor.specs = []
    with pytest.raises(UserError, match=r"data.init_args.sources=\[\]: no source. Fix: "):
        _ = processor.sources


def test_first_pairs_are_distinct_balanced_and_depend_on_the_seed(build):
    processor = build([finding(n, "info" if n % 10 else "critical") for n in range(200)] * 2, val_fraction=0.4)
    pairs = first_pairs(processor, "val", "risk", 20, balanced=False, seed=0)
    assert len({pair.content for pair in pairs}) == 20
    assert pairs == first_pairs(processor, "val", "risk", 20, balanced=False, seed=0)
    assert pairs != first_pairs(processor, "val", "risk", 20, balanced=False, seed=1)
    balanced = first_pairs(processor, "val", "risk", 10, balanced=True, seed=0)
    assert len(balanced) == 10
    assert sum(pair.severity == "critical" for pair in balanced) >= 2


def test_first_pairs_stop_reading_where_a_severity_is_too_rare(build, tmp_path, monkeypatch):
    folder = tmp_path / "many"
    folder.mkdir()
    for part in range(20):
        findings = [finding(part * 100 + n, "info") for n in range(100)]
        (folder / f"{part:02}.json").write_bytes(document(findings))
    processor, read = build([finding(1)], val_fraction=0, test_fraction=0), []
    processor.specs = [str(folder)]
    pairs_of = processor.pairs
    monkeypatch.setattr(processor, "pairs", lambda raw, *rest: read.append(raw.member) or pairs_of(raw, *rest))
    pairs = first_pairs(processor, "train", "risk", 5, balanced=True, seed=0)
    assert [pair.severity for pair in pairs] == ["info"] * 5
    assert len(read) == 3  # 250 = 50 * 5 pairs, of 2,000
    assert open_source(str(folder))
