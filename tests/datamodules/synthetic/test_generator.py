"""The generator: what it writes is schema-true, reproducible, learnable, and not by a look-up."""

import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import jsonschema
import orjson
import pytest

from datamodules.errors import UserError
from datamodules.records import BASELINE_STATUSES, CATEGORIES, SEVERITIES, SUBSCORES
from datamodules.sources import open_source, parse
from datamodules.synthetic import correlate, iter_documents, synthesize, truth
from datamodules.synthetic.labeling_rules import TABLES

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT / "../shared/data"


def findings_of(document):
    if "enriched_findings" in document:
        return document["enriched_findings"]
    return [f for by_severity in document["data"]["findings"].values() for group in by_severity.values() for f in group]


def drawn(count, seed=0, **options):
    return [finding for document in iter_documents(count, seed, **options) for finding in findings_of(document)]


def input_of(finding):
    return json.dumps([finding[name] for name in ("category", "title", "description", "metadata")], sort_keys=True)


@pytest.fixture(scope="module")
def findings():
    return drawn(12000, seed=3)


def digest(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files if path.is_dir()] or [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    ]


@pytest.mark.parametrize("name", ["folder", "archive.tar.gz"])
def test_same_seed_same_bytes(tmp_path, name):
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
    """Raise GENERATOR_VERSION together with this digest: old seeds then mean other data."""
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


def test_envelope_is_the_archives(tmp_path):
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
def test_sources_read_back_what_was_written(tmp_path, name, envelope, layout):
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
    correlations = [
        c for d in expected for c in (d["correlations"] if layout == "ground_truth" else d["data"]["correlations"])
    ]
    key = "related_finding_ids" if layout == "ground_truth" else "correlation_refs"
    assert [(c.id, c.type, c.finding_ids) for d in read for c in d.correlations] == [
        (c["id"], c["correlation_type"], c[key]) for c in correlations
    ]
    if layout == "ground_truth":
        assert [(d.summaries, d.actions) for d in read] == [(d["summaries"], d["actions"]) for d in expected]


def test_archive_keeps_its_name_free_until_it_is_complete(tmp_path):
    def stop(done):
        assert not (tmp_path / "some.tar.gz").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "some.tar.gz", findings=10, seed=0, progress=stop)
    assert not list(tmp_path.iterdir())


def test_every_category_has_every_severity_in_its_natural_share(findings):
    assert set(Counter((f["category"], f["severity"]) for f in findings)) == {
        (category, severity) for category in CATEGORIES for severity in SEVERITIES
    }
    shares = Counter(f["severity"] for f in findings)
    for severity, share in zip(SEVERITIES, (0.50, 0.15, 0.18, 0.12, 0.05), strict=True):
        assert shares[severity] / len(findings) == pytest.approx(share, abs=0.001)


def test_answers_are_the_rules_within_the_stated_noise(findings):
    moved = Counter()
    for finding in findings:
        answer = truth(finding)
        for name in ("severity", "tags", "baseline_status", "base_severity_score"):
            assert finding[name] == answer[name]
        assert finding.get("rationale") == answer.get("rationale")
        assert abs(finding["risk_score"] - answer["risk_score"]) <= 3
        assert SEVERITIES[min(int(finding["risk_score"] // 20), 4)] == finding["severity"]  # noise keeps the band
        assert finding["risk_total"] == finding["risk_score"]
        assert finding["probability_actionable"] == pytest.approx(answer["probability_actionable"], abs=0.0201)
        for name in SUBSCORES:
            assert finding["risk_subscores"][name] == pytest.approx(answer["risk_subscores"][name], abs=0.0201)
            assert 0 <= finding["risk_subscores"][name] <= 1
        moved[finding["risk_score"] - answer["risk_score"]] += 1
        assert len(finding["tags"]) <= 4
        assert finding["baseline_status"] in BASELINE_STATUSES
    assert set(moved) == set(range(-3, 4))  # the noise is there


def independent_severity(category, description, metadata):
    """The stated rules, read anew from words and values, without the generator's tables."""
    words = {
        "Expected": 0,
        "Unusual": 1,
        "Tampered": 2,
        "Known-bad": 3,
        "It limits": 1,
        "It protects": 2,
        "It closes": 3,
    }
    sentence = description.split(". ")[-1]
    evidence = next(step for word, step in words.items() if sentence.startswith(word))
    if category == "kernel_params" and metadata["current"] == metadata["desired"]:
        evidence = 0
    root = "root" in [metadata.get(key) for key in ("user", "owner", "set_by", "loaded_by")]
    place = next(
        metadata[k] for k in ("command", "local_address", "listen", "resolver", "source", "path") if k in metadata
    )
    opened = (
        place.split("/")[1] in ("tmp", "dev", "var", "srv")
        if place.startswith("/")
        else (place.split(":")[0] == "0.0.0.0" or place.startswith(("[::]", "203.", "198.")))
    )
    opened = opened and not place.startswith("/var/lib")
    return SEVERITIES[min(max(evidence + root + opened - (metadata["mitigation"] != "none"), 0), 4)]


def test_a_reader_of_the_inputs_finds_the_severity(findings):
    right = sum(independent_severity(f["category"], f["description"], f["metadata"]) == f["severity"] for f in findings)
    assert right / len(findings) >= 0.97


@pytest.mark.parametrize(
    ("key", "most"),
    [
        (lambda f: f["title"], 0.6),
        (lambda f: (f["category"], f["title"]), 0.6),
        (lambda f: f["description"].rpartition(". ")[2], 0.93),
        (lambda f: json.dumps(f["metadata"], sort_keys=True), 0.6),
    ],
    ids=["title", "category and title", "evidence", "metadata"],
)
def test_a_lookup_does_not_find_the_severity(findings, key, most):
    seen = defaultdict(Counter)
    for finding in findings[:9000]:
        seen[key(finding)][finding["severity"]] += 1
    held_out = drawn(3000, seed=4)
    guesses = [seen[key(f)].most_common(1)[0][0] if key(f) in seen else "info" for f in held_out]
    assert sum(guess == f["severity"] for guess, f in zip(guesses, held_out, strict=True)) / len(held_out) < most


def test_one_title_has_every_severity(findings):
    by_title = defaultdict(set)
    for finding in findings:
        by_title[finding["title"]].add(finding["severity"])
    for title in ("Listening TCP service", "SUID binary", "World-writable file", "Running process: nginx"):
        assert by_title[title] == set(SEVERITIES)


def test_exact_duplicates_are_rare_unless_asked_for(findings):
    assert len({input_of(f) for f in findings}) > 0.98 * len(findings)


def test_duplicates_and_conflicts_come_as_asked():
    asked = drawn(2000, seed=1, duplicates=0.10, conflicts=0.05)
    answers = defaultdict(list)
    for finding in asked:
        answers[input_of(finding)].append(finding["severity"])
    groups = [severities for severities in answers.values() if len(severities) > 1]
    assert len(asked) == len({f["id"] for f in asked}) == 2000
    assert sum(len(group) - 1 for group in groups) == pytest.approx(300, abs=5)
    assert sum(len(set(group)) > 1 for group in groups) == pytest.approx(100, abs=5)


def test_hostile_text_is_there_and_moves_no_answer(findings):
    hostile = [
        f
        for f in findings
        if any(text in json.dumps(f["metadata"], ensure_ascii=False).replace('\\"', '"') for text in TABLES["hostile"])
    ]
    assert 0.005 < len(hostile) / len(findings) < 0.02
    assert {f["severity"] for f in hostile} >= {"info", "medium", "high"}
    text = json.dumps([f["metadata"] for f in hostile])
    assert all(mark in text for mark in ("[/INST]", "</s>", "<|im_end|>", "ignore your instructions"))


@pytest.mark.parametrize("layout", ["batch", "ground_truth"])
def test_correlations_tie_present_findings_that_share_a_key(layout):
    types = Counter()
    for document in iter_documents(6000, 8, layout=layout, findings_per_shard=3000):
        present = {f["id"]: f for f in findings_of(document)}
        correlations = document["correlations"] if layout == "ground_truth" else document["data"]["correlations"]
        back = defaultdict(list)
        for correlation in correlations:
            ids = correlation["related_finding_ids" if layout == "ground_truth" else "correlation_refs"]
            members = [present[identifier] for identifier in ids]
            assert len(members) == len(set(ids)) >= 2
            assert any(len({str(m["metadata"].get(key)) for m in members}) == 1 for key in ("pid", "path"))
            assert any(m["tags"][0] != "expected" for m in members)
            worst = max(truth(m)["risk_score"] for m in members)
            assert correlation["risk_score_delta"] == min(worst + 20, 99) - worst
            types[correlation["correlation_type"]] += 1
            for identifier in ids:
                back[identifier].append(correlation["id"])
        assert all(sorted(f["correlation_refs"]) == sorted(back[f["id"]]) for f in present.values())
    assert set(types) == set(TABLES["correlations"])


def test_some_findings_share_a_key_without_a_correlation():
    """Else a model could say "correlated" whenever two PIDs are equal."""
    for document in iter_documents(5000, 2):
        groups = defaultdict(list)
        for finding in findings_of(document):
            if "pid" in finding["metadata"]:
                groups[str(finding["metadata"]["pid"])].append(finding)
        pairs = [group for group in groups.values() if len(group) > 1]
        benign = [group for group in pairs if not any(f["correlation_refs"] for f in group)]
        assert 0.02 < len(benign) / len(pairs) < 0.5
        assert all(f["tags"][0] == "expected" for group in benign for f in group)


def test_correlate_reads_only_the_inputs():
    (document,) = iter_documents(1500, 9)
    stripped = [
        {name: f[name] for name in ("id", "category", "description", "metadata")} for f in findings_of(document)
    ]
    found = {(c.type, frozenset(stripped[i]["id"] for i in c.members), c.severity) for c in correlate(stripped)}
    assert found == {
        (c["correlation_type"], frozenset(c["correlation_refs"]), c["severity"])
        for c in document["data"]["correlations"]
    }


def test_ground_truth_validates():
    path = SHARED / "ground_truth_schema.json"
    if not path.exists():
        pytest.skip("the ground-truth schema of ../shared/data is not here")
    validator = jsonschema.Draft202012Validator(json.loads(path.read_text()))
    for count in (1, 40, 800):
        (document,) = iter_documents(count, 3, layout="ground_truth")
        validator.validate(json.loads(orjson.dumps(document)))


def test_ground_truth_summaries_and_actions_follow_from_the_findings():
    (document,) = iter_documents(900, 3, layout="ground_truth")
    findings = document["enriched_findings"]
    severities = Counter(f["severity"] for f in findings)
    assert f"900 findings: {severities['critical']} critical" in document["summaries"]["executive_summary"]
    scores = [top["risk_score"] for top in document["reductions"]["top_findings"]]
    assert scores == sorted((f["risk_score"] for f in findings), reverse=True)[:10]
    urgent = {f["category"] for f in findings if f["severity"] in ("high", "critical")}
    assert {action["id"].removeprefix("action_") for action in document["actions"]} == urgent
    by_id = {f["id"]: f for f in findings}
    for action in document["actions"]:
        assert by_id[action["related_finding_ids"][0]]["severity"] == action["severity"]


def test_statistics_and_indexes_are_those_of_the_findings():
    (document,) = iter_documents(1200, 6)
    data, findings = document["data"], findings_of(document)
    assert data["statistics"]["severity_distribution"] == Counter(f["severity"] for f in findings)
    assert data["statistics"]["category_distribution"] == Counter(f["category"] for f in findings)
    assert data["statistics"]["total_correlations"] == len(data["correlations"])
    assert set(data["indexes"]["findings_by_id"]) == {f["id"] for f in findings}
    for category, by_severity in data["findings"].items():
        for severity, group in by_severity.items():
            assert all((f["category"], f["severity"]) == (category, severity) for f in group)


def test_fields_are_those_of_the_real_shards():
    path = SHARED / "batches/batch_001_20250919_081119.json"
    if not path.exists():
        pytest.skip("the real shards of ../shared/data are not here")
    real = json.loads(gzip.decompress(bytes.fromhex(json.loads(path.read_text())["data"])))
    (ours,) = iter_documents(3000, 0)
    ours = json.loads(orjson.dumps(ours))
    assert set(ours["data"]) == set(real["data"])
    assert set(ours["data"]["statistics"]) == set(real["data"]["statistics"])
    assert set(ours["data"]["indexes"]) == set(real["data"]["indexes"])
    assert set(ours["metadata"]) <= set(real["metadata"])
    kinds = {name: type(value) for f in findings_of(real) for name, value in f.items() if value is not None}
    optional = {"graph_degree": int, "cluster_id": str, "rationale": str}
    for finding in findings_of(ours):
        assert {n: type(v) for n, v in finding.items()}.items() <= (optional | kinds).items()
        assert finding.keys() >= {n for n, v in findings_of(real)[0].items() if v is not None}
    real_correlation, correlation = real["data"]["correlations"][0], ours["data"]["correlations"][0]
    named = {name for name, value in real_correlation.items() if value is not None and not name.startswith("_")}
    assert correlation.keys() >= named


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"findings": 0}, "--findings is 0"),
        ({"findings": 5, "seed": -1}, "--seed is -1"),
        ({"findings": 5, "findings_per_shard": 0}, "--findings_per_shard is 0"),
        ({"findings": 5, "layout": "csv"}, "--layout is 'csv'"),
        ({"findings": 5, "conflicts": 0.6}, "conflicts 0.6"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        synthesize(tmp_path / "x", **({"seed": 0} | options))
    assert not (tmp_path / "x").exists()


def test_truth_refuses_findings_it_did_not_write():
    with pytest.raises(ValueError, match="not written by this generator"):
        truth({"id": "f", "category": "mac", "description": "AppArmor detection", "metadata": {}})
