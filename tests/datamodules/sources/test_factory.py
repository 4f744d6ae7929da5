"""Opening sources: every kind gives the same records, and an unusable source is a user error."""

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.errors import UserError
from datamodules.sources import open_source, parse
from tests.helpers.findings_data import finding
from tests.helpers.sources_data import (
    COMPRESSIONS,
    FIVE_FINDINGS,
    GENERATION_REPORT,
    batch_document,
    gzip_bytes,
    json_lines,
    parquet_table,
    read_source,
    read_spec,
    shard,
    tar,
    write,
)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", json.dumps(batch_document(*range(5))).encode()),
        ("a.json", shard(*range(5))),
        ("a.json", json.dumps(batch_document(*range(5)), indent=1).encode()),
        ("a.json", json.dumps([finding(n) for n in range(5)]).encode()),
        ("a.jsonl", json_lines(*range(5))),
        ("a.json", json_lines(*range(5))),
        ("a.jsonl", json.dumps(batch_document(*range(5)), indent=1).encode()),
        ("a.jsonl", shard(0, 1) + b"\n" + shard(2, 3) + b"\n\n" + json_lines(4)),
        ("a.ndjson", json_lines(*range(5))[:-1]),
        ("a.parquet", parquet_table(*range(5))),
        ("a.parquet", parquet_table(*range(5), as_text=True)),
        ("a.tar", tar(FIVE_FINDINGS)),
        ("no_suffix", tar(FIVE_FINDINGS)),
        ("no_suffix", json_lines(*range(5))),
        ("no_suffix", parquet_table(*range(5))),
    ],
)
def test_every_kind_of_file_gives_the_same_findings(tmp_path, name, data, suffix):
    spec = write(tmp_path / (name + suffix), COMPRESSIONS[suffix](data))
    source = open_source(spec)
    assert read_source(source) == ([0, 1, 2, 3, 4], [])
    assert read_source(pickle.loads(pickle.dumps(source))) == ([0, 1, 2, 3, 4], [])  # as sent to worker processes
    assert read_spec(spec, cache_dir=tmp_path / "cache") == ([0, 1, 2, 3, 4], [])
    assert source.fingerprint() == open_source(spec).fingerprint()
    os.utime(spec, ns=(1, 1))
    assert source.fingerprint() != open_source(spec).fingerprint()


def test_synthetic_findings_are_generated_once(tmp_path):
    spec = "synthetic://?findings=60&seed=3"
    source = open_source(spec, cache_dir=tmp_path)
    parsed = [parse(raw) for raw in source.raw_documents()]
    assert sum(len(p.document.findings) for p in parsed) == 60
    assert {p.document.source for p in parsed} == {spec}
    assert not any(p.quarantined for p in parsed)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert times
    again = open_source(spec, cache_dir=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == times
    other = open_source("synthetic://?findings=60&seed=4", cache_dir=tmp_path)
    assert again.fingerprint() == source.fingerprint() != other.fingerprint()
    assert not list(tmp_path.rglob(".generating-*"))


def test_a_folder_that_another_process_generated_is_used(tmp_path, monkeypatch):
    spec = "synthetic://?findings=20&seed=1"

    def findings(cache_dir):
        raws = open_source(spec, cache_dir=cache_dir).raw_documents()
        return [record for raw in raws for record in parse(raw).document.findings]

    first = findings(tmp_path / "one")
    (folder,) = (tmp_path / "one/synthetic").iterdir()
    target = tmp_path / "two/synthetic" / folder.name

    def generate(temporary, **_):
        write(temporary / "half.json", b"{")
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)  # the other process finishes first

    monkeypatch.setattr("datamodules.synthetic.synthesize", generate)
    assert findings(tmp_path / "two") == first
    assert [path.name for path in target.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("options", ["findings=many", "findings=0", "findings=-3", "count=3", "findings=3&seed=x"])
def test_wrong_options_of_the_generator_are_a_user_error(tmp_path, options):
    with pytest.raises(UserError, match="Fix: write synthetic"):
        open_source(f"synthetic://?{options}", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (None, None, "no such file or folder"),
        ("a*.json", None, "no file matches"),
        ("unknown://x", None, "Protocol not known"),
        ("a.json", b"", "is empty"),
        ("a.json.gz", gzip_bytes(b""), "is empty"),
        ("a.tar.gz", gzip_bytes(tar({})), "holds no findings"),
        ("a.tar.gz", gzip_bytes(tar({"readme.txt": b"text"})), "holds no findings"),
        ("a.tar.gz", gzip_bytes(tar({"generation_report.json": GENERATION_REPORT})), "holds no findings"),
        ("a.tar.gz", b"\x1f\x8b" + b"\0" * 100, "damaged from its start"),
        ("a.json", b'{"results": [{"scanner": "ioc", "findings": []}]}', "`analyze` reads"),
        ("a.json", b'{"fact_pack_version": "3", "findings": []}', "`analyze` reads"),
        ("a.json", b"[]", "holds no findings"),
        ("a.json", b"not json", "bad_json"),
        ("a.jsonl", b"not json\nat all\n", "bad_json"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "neither JSON nor Parquet"),
        ("a.zip", b"PK\x03\x04" + b"\0" * 600, "neither JSON nor Parquet"),
        ("a.txt", b"hello", "neither JSON nor Parquet"),
        ("a.parquet", b"PAR1garbage", "holds no findings"),
    ],
)
def test_an_unusable_source_is_a_user_error(tmp_path, name, data, message):
    spec = str(tmp_path / (name or "nothing")) if "://" not in (name or "") else name
    if data is not None:
        write(Path(spec), data)
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec)
    assert str(caught.value).startswith(f"data.sources={spec}: ")
    assert ". Fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_findings_is_a_user_error(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "text/readme.txt", b"hello")
    write(tmp_path / "reports/a.json", b'{"results": []}')
    write(tmp_path / "archives/a.tar.gz", gzip_bytes(tar(FIVE_FINDINGS)))
    for name, message in [
        ("empty", "no .json"),
        ("text", "no .json"),
        ("reports", "`analyze`"),
        ("archives", "no .json"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name))
    with pytest.raises(UserError, match="name each archive"):
        open_source(str(tmp_path / "archives/*.gz"))


def test_real_batches(shared_data):
    for spec in (shared_data / "batches", shared_data / "batches" / "*.json"):
        totals = [0, 0, 0, 0]
        for raw in open_source(str(spec)).raw_documents():
            parsed = parse(raw)
            counts = (parsed.document.findings, parsed.document.correlations, parsed.quarantined, parsed.skipped)
            totals = [total + len(count) for total, count in zip(totals, counts, strict=True)]
        assert totals == [6020, 3432, 0, 1]
    batch = open_source(str(shared_data / "plain_batch.json"))
    assert len(parse(next(batch.raw_documents())).document.findings) == 22
    truth = parse(next(open_source(str(shared_data / "ground_truth_example.json")).raw_documents())).document
    assert truth.summaries["executive_summary"] and truth.actions
    with pytest.raises(UserError, match="analyze"):
        open_source(str(shared_data / "reports" / "host_scan.json"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["a.json", "a.jsonl", "a.parquet", "a.tar", "a.gz", "a"]), st.binary(max_size=400))
def test_random_bytes_are_a_user_error(tmp_path, name, data):
    spec = write(tmp_path / name, data)
    with pytest.raises(UserError):
        read_spec(spec)
