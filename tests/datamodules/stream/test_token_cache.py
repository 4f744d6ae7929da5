"""The token cache: the same batches, no repeated reading, detected damage."""

from pathlib import Path

import orjson
import pytest
import torch

from datamodules import FindingsDataModule
from datamodules.sources import tar_reader
from datamodules.stream import preprocessing, workers
from tests.helpers.findings_data import document, finding, write_archive, write_folder


@pytest.fixture(scope="session")
def tokenizer(mistral_tokenizer_folder):
    return mistral_tokenizer_folder


@pytest.fixture
def parsed(monkeypatch):
    """Members whose documents were parsed after the list was cleared."""
    members, parse = [], preprocessing.parse

    def watch(raw):
        members.append(raw.member)
        return parse(raw)

    monkeypatch.setattr(preprocessing, "parse", watch)
    return members


@pytest.fixture
def walked(monkeypatch):
    """Members whose bytes were read after the list was cleared."""
    members, walk = [], workers.walk

    def watch(*arguments):
        for place, unit, raw in walk(*arguments):
            if raw is not None:
                members.append(raw.member)
            yield place, unit, raw

    monkeypatch.setattr(workers, "walk", watch)
    return members


@pytest.fixture(params=["folder", "archive", "lines"])
def source(request, tmp_path, monkeypatch):
    if request.param == "archive":
        return str(write_archive(tmp_path / "findings.tar.gz", [12, 5, 20]))
    if request.param == "lines":
        monkeypatch.setattr(tar_reader, "CHUNK_RECORDS", 15)
        path = tmp_path / "findings.jsonl"
        path.write_bytes(b"\n".join(orjson.dumps(finding(n)) for n in range(37)))
        return str(path)
    return str(write_folder(tmp_path / "shards", [12, 5, 20]))


def build(source, tokenizer, cache, **changes):
    options = {
        "sequence_length": 2048,
        "packing": "shared_prefix",
        "num_workers": 0,
        "prefetch_batches": 0,
        "val_fraction": 0.2,
    }
    module = FindingsDataModule([source], tokenizer, cache_dir=str(cache) if cache else None, **options | changes)
    module.setup("fit")
    return module


def same(expected, got):
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.input_ids_BT, b.input_ids_BT)
        assert torch.equal(a.labels_BT, b.labels_BT)
        assert a.cursor is b.cursor is None or a.cursor.digest == b.cursor.digest


def arrows(folder):
    return sorted(Path(folder).glob("tokens-*/*.arrow"))


def test_later_epochs_and_runs_read_only_the_cache(source, tokenizer, tmp_path, parsed, walked):
    expected = build(source, tokenizer, None)
    epochs = [list(expected.train_batches(epoch)) for epoch in (0, 1)]
    held_out = list(expected.eval_batches("val"))
    for run in range(2):
        module = build(source, tokenizer, tmp_path / "cache")
        parsed.clear()
        walked.clear()
        same(epochs[0], module.train_batches(0))
        assert module.counts == expected.counts
        if run == 0:
            assert len(parsed) == len(arrows(tmp_path / "cache")) >= 3
            parsed.clear()
            walked.clear()
        same(epochs[1], module.train_batches(1))
        assert parsed == walked == []
        same(held_out, module.eval_batches("val"))
        assert bool(parsed) == (run == 0)  # another split, other files


def test_an_interrupted_first_epoch_is_completed_by_the_next(source, tokenizer, tmp_path, parsed):
    expected = list(build(source, tokenizer, None).train_batches())
    module = build(source, tokenizer, tmp_path / "cache", block_findings=8)
    stream = module.train_batches()
    next(stream)
    stream.close()
    before = len(arrows(tmp_path / "cache"))
    module = build(source, tokenizer, tmp_path / "cache")
    parsed.clear()
    same(expected, module.train_batches())
    assert 0 < before <= len(arrows(tmp_path / "cache"))
    assert len(parsed) == len(arrows(tmp_path / "cache")) - before


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone", "half written"])
def test_damaged_files_are_detected_and_rebuilt(source, tokenizer, tmp_path, parsed, damage):
    cache = tmp_path / "cache"
    module = build(source, tokenizer, cache)
    expected = list(module.train_batches())
    victim = arrows(cache)[1]
    data = victim.read_bytes()
    changed = {"cut": data[: len(data) // 2], "flipped": data[:300] + bytes([data[300] ^ 1]) + data[301:], "empty": b""}
    if damage == "gone":
        victim.unlink()
    elif damage == "half written":
        victim.rename(victim.with_suffix(".123.tmp"))
    else:
        victim.write_bytes(changed[damage])
    parsed.clear()
    same(expected, build(source, tokenizer, cache).train_batches())
    assert len(parsed) == 1
    assert victim.read_bytes() == data


def test_the_folder_name_depends_on_all_settings_of_the_content(tokenizer, tmp_path, chatml_tokenizer):
    folder, cache = write_folder(tmp_path / "shards", [6]), tmp_path / "cache"
    chatml_tokenizer.save_pretrained(tmp_path / "chatml")
    changes = [{}, {"seed": 1}, {"val_fraction": 0.3}, {"task_weights": {"triage": 1.0}}, {"conflicts": "merge"}]
    for change in changes:
        list(build(str(folder), tokenizer, cache, **change).train_batches())
    list(build(str(folder), str(tmp_path / "chatml"), cache).train_batches())
    assert len(list(cache.glob("tokens-*"))) == len(changes) + 1
    for change in ({"sequence_length": 4096}, {"packing": "packed"}, {"severity_balance": 1.0}, {"conflicts": "drop"}):
        list(build(str(folder), tokenizer, cache, **change).train_batches())
    assert len(list(cache.glob("tokens-*"))) == len(changes) + 1
    (folder / "batch_001.json").write_bytes(document([finding(77)]))
    list(build(str(folder), tokenizer, cache).train_batches())
    assert len(list(cache.glob("tokens-*"))) == len(changes) + 2


def test_ids_are_uint16_and_arrow_reads_them(tokenizer, tmp_path):
    import pyarrow as pa

    list(build(str(write_folder(tmp_path / "shards", [6])), tokenizer, tmp_path / "cache").train_batches())
    with pa.ipc.open_stream(arrows(tmp_path / "cache")[0].read_bytes()) as reader:
        table = reader.read_all()
    assert table.schema.field("ids").type.value_type == pa.uint16()
    assert len(table["ids"][0]) == table["prompts"][0].as_py() + table["completions"][0].as_py()


def test_quarantine_is_the_same_from_the_cache(tokenizer, tmp_path):
    folder, counts = tmp_path / "bad", []
    folder.mkdir()
    (folder / "0.json").write_bytes(document([*(finding(n) for n in range(50)), "no finding"]))
    for run in range(2):
        path = tmp_path / f"{run}.jsonl"
        module = build(str(folder), tokenizer, tmp_path / "cache", quarantine_path=str(path), max_quarantine=0.5)
        list(module.train_batches())
        counts.append(module.counts)
    assert counts[0] == counts[1]
    assert counts[0]["quarantined"] == 1
    assert (tmp_path / "0.jsonl").read_text() == (tmp_path / "1.jsonl").read_text() != ""
