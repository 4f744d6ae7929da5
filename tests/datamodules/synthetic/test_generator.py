"""The files that the generator writes: the same seed gives the same bytes, and the sources read them back."""

import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import orjson
import pytest

from datamodules.errors import UserError
from datamodules.sources import open_source, parse
from datamodules.synthetic import iter_documents, synthesize
from tests.helpers.synthetic_data import correlations_of, findings_of, generate_findings, input_of

ROOT = Path(__file__).resolve().parents[3]


def digest(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files if path.is_dir()] or [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    ]


@pytest.mark.parametrize("name", ["folder", "archive.tar.gz"])
def test_the_same_seed_gives_the_same_bytes(tmp_path, name):
    first, again, other = (tmp_path / run / name for run in "abc")
    synthesize(first, findings=700, seed=5, findings_per_shard=300)
    synthesize(again, findings=700, seed=5, findings_per_shard=300)
    synthesize(other, findings=700, seed=6, findings_per_shard=300)
    assert digest(first) == digest(again)
    assert digest(first) != digest(other)


def test_bytes_do_not_depend_on_the_process(tmp_path):
    synthesize(tmp_path / "here", findings=300, seed=5)
    script = (
        "import sys, pathlib, datamodules.synthetic as s; s.synthesize(pathlib.Path(sys.argv[1]), findings=300, seed=5)"
    )
    environment = {"PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], check=True, env=environment, cwd=tmp_path)
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


def test_documents_of_a_seed_stay_the_same():
    """If the documents change, change GENERATOR_VERSION with this digest: old seeds then give other data."""
    content = b"".join(orjson.dumps(document) for document in iter_documents(500, 11, findings_per_shard=200))
    assert hashlib.sha256(content).hexdigest() == "af4c57258f57e4301a2bf68663ec906735407462312c7b39d3d8b9d8c93b35f9"


def test_a_shard_does_not_depend_on_the_number_of_shards():
    short, long = (list(iter_documents(count, 1, findings_per_shard=100)) for count in (200, 500))
    assert short == long[:2]
    assert long[0]["data"]["findings"] != long[1]["data"]["findings"]


@pytest.mark.parametrize("count", [1, 7, 300, 301, 650])
@pytest.mark.parametrize("layout", ["batch", "ground_truth"])
def test_counts_are_exact(tmp_path, count, layout):
    ticks = []
    report = synthesize(
        tmp_path, findings=count, seed=0, layout=layout, findings_per_shard=300, envelope=False, progress=ticks.append
    )
    shards = sorted(tmp_path.glob("batch_*.json"))
    written = [json.loads(shard.read_text()) for shard in shards]
    assert [len(findings_of(document)) for document in written] == [min(300, count - i) for i in range(0, count, 300)]
    ids = [finding["id"] for document in written for finding in findings_of(document)]
    assert len(set(ids)) == len(ids) == count == report.findings == ticks[-1]
    assert report.shards == len(shards) == len(ticks)
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    stats = json.loads((tmp_path / "generation_report.json").read_text())["generation_stats"]
    assert (stats["total_findings"], stats["total_correlations"]) == (count, report.correlations)


def test_the_envelope_has_the_format_of_the_archive(tmp_path):
    synthesize(tmp_path, findings=50, seed=2)
    (shard,) = tmp_path.glob("batch_*.json")
    envelope = json.loads(shard.read_text())
    packed = bytes.fromhex(envelope["data"])
    content = gzip.decompress(packed)
    assert list(envelope) == ["compressed", "compression_method", "original_size", "compressed_size", "data"]
    assert (envelope["compressed"], envelope["compression_method"]) == (True, "gzip")
    assert (envelope["original_size"], envelope["compressed_size"]) == (len(content), len(packed))
    assert json.loads(content) == next(iter_documents(50, 2))


def test_archive_reads_with_tarfile_and_equals_the_folder(tmp_path):
    options = {"findings": 250, "seed": 4, "findings_per_shard": 100}
    synthesize(tmp_path / "folder", **options)
    report = synthesize(tmp_path / "some.tgz", **options)
    assert report.bytes == (tmp_path / "some.tgz").stat().st_size
    with tarfile.open(tmp_path / "some.tgz") as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}
    expected = {f"massive_datasets/{file.name}": file.read_bytes() for file in (tmp_path / "folder").iterdir()}
    assert members == expected
    assert list(members)[:2] == [f"massive_datasets/batch_00{i}_20250919_0811{s}.json" for i, s in ((1, 19), (2, 21))]
    assert list(members)[-1] == "massive_datasets/generation_report.json"


@pytest.mark.parametrize("layout", ["batch", "ground_truth"])
@pytest.mark.parametrize("envelope", [True, False])
@pytest.mark.parametrize("name", ["folder", "some.tar.gz"])
def test_the_sources_read_the_written_findings(tmp_path, name, envelope, layout):
    options = {"seed": 4, "findings_per_shard": 150, "layout": layout}
    synthesize(tmp_path / name, findings=400, envelope=envelope, **options)
    parsed = [parse(raw) for raw in open_source(str(tmp_path / name)).raw_documents()]
    assert not [record for part in parsed for record in part.quarantined]
    assert not sum((part.repairs for part in parsed), Counter())
    expected, read = list(iter_documents(400, **options)), [part.document for part in parsed if part.document.findings]
    fields = ("id", "title", "category", "description", "severity", "risk_score", "metadata", "tags", "baseline_status",
              "risk_subscores", "probability_actionable", "correlation_refs")  # fmt: skip
    written = {f["id"]: tuple(f[name] for name in fields) for document in expected for f in findings_of(document)}
    assert {f.id: tuple(getattr(f, name) for name in fields) for d in read for f in d.findings} == written
    correlations = [correlation for document in expected for correlation in correlations_of(document)]
    key = "related_finding_ids" if layout == "ground_truth" else "correlation_refs"
    assert [(c.id, c.type, c.finding_ids) for d in read for c in d.correlations] == [
        (c["id"], c["correlation_type"], c[key]) for c in correlations
    ]
    if layout == "ground_truth":
        assert [(d.summaries, d.actions) for d in read] == [(d["summaries"], d["actions"]) for d in expected]


def test_an_interrupted_archive_leaves_no_file(tmp_path):
    def stop(done):
        assert not (tmp_path / "some.tar.gz").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "some.tar.gz", findings=10, seed=0, progress=stop)
    assert not list(tmp_path.iterdir())


def test_exact_duplicates_are_rare_by_default(findings):
    assert len({input_of(f) for f in findings}) > 0.98 * len(findings)


def test_the_shares_of_duplicates_and_conflicts():
    sample = generate_findings(2000, seed=1, duplicates=0.10, conflicts=0.05)
    answers = defaultdict(list)
    for finding in sample:
        answers[input_of(finding)].append(finding["severity"])
    groups = [severities for severities in answers.values() if len(severities) > 1]
    assert len(sample) == len({f["id"] for f in sample}) == 2000
    assert sum(len(group) - 1 for group in groups) == pytest.approx(300, abs=5)
    assert sum(len(set(group)) > 1 for group in groups) == pytest.approx(100, abs=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"findings": 0}, "--findings=0: must be at least 1"),
        ({"findings": 5, "seed": -1}, "--seed=-1: must be at least 0"),
        ({"findings": 5, "findings_per_shard": 0}, "--findings_per_shard=0: must be"),
        ({"findings": 5, "layout": "csv"}, "--layout=csv: must be batch or ground_truth"),
        ({"findings": 5, "conflicts": 0.6}, "conflicts=0.6: must be"),
    ],
)
def test_arguments_out_of_range_raise_an_error(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        synthesize(tmp_path / "x", **({"seed": 0} | options))
    assert not (tmp_path / "x").exists()
