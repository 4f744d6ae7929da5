"""The texts and metadata of generated findings."""

import gzip
import json
from collections import defaultdict

import orjson

from datamodules.records import CATEGORIES, SEVERITIES
from datamodules.synthetic import iter_documents
from datamodules.synthetic.finding_text import write_findings
from datamodules.synthetic.labeling_rules import TABLES, extract_features
from datamodules.synthetic.sampling import FEATURES, RandomStream, sample_findings
from tests.helpers.synthetic_data import findings_of


def test_one_title_has_every_severity(findings):
    by_title = defaultdict(set)
    for finding in findings:
        by_title[finding["title"]].add(finding["severity"])
    for title in ("Listening TCP service", "SUID binary", "World-writable file", "Running process: nginx"):
        assert by_title[title] == set(SEVERITIES)


def test_prompt_injections_occur_with_every_severity(findings):
    injected = [
        f
        for f in findings
        if any(text in json.dumps(f["metadata"], ensure_ascii=False).replace('\\"', '"') for text in TABLES["hostile"])
    ]
    assert 0.005 < len(injected) / len(findings) < 0.02
    assert {f["severity"] for f in injected} >= {"info", "medium", "high"}
    text = json.dumps([f["metadata"] for f in injected])
    assert all(mark in text for mark in ("[/INST]", "</s>", "<|im_end|>", "ignore your instructions"))


def test_fields_and_types_equal_those_of_a_real_shard(shared_data):
    path = shared_data / "batches/batch_001_20250919_081119.json"
    real = json.loads(gzip.decompress(bytes.fromhex(json.loads(path.read_text())["data"])))
    (generated,) = iter_documents(3000, 0)
    generated = json.loads(orjson.dumps(generated))
    assert set(generated["data"]) == set(real["data"])
    assert set(generated["data"]["statistics"]) == set(real["data"]["statistics"])
    assert set(generated["data"]["indexes"]) == set(real["data"]["indexes"])
    assert set(generated["metadata"]) <= set(real["metadata"])
    kinds = {name: type(value) for f in findings_of(real) for name, value in f.items() if value is not None}
    optional = {"graph_degree": int, "cluster_id": str, "rationale": str}
    for finding in findings_of(generated):
        assert {n: type(v) for n, v in finding.items()}.items() <= (optional | kinds).items()
        assert finding.keys() >= {n for n, v in findings_of(real)[0].items() if v is not None}
    real_correlation, correlation = real["data"]["correlations"][0], generated["data"]["correlations"][0]
    named = {name for name, value in real_correlation.items() if value is not None and not name.startswith("_")}
    assert correlation.keys() >= named


def test_the_features_can_be_extracted_from_the_written_findings():
    samples = sample_findings(RandomStream(7), 3000)
    written = list(write_findings(samples, 0, processed_at="2025-01-01", whole_numbers=True))
    for sample, finding in zip(samples, written, strict=True):
        _, features = extract_features(finding)
        expected = FEATURES[sample.features]
        assert features == expected, finding
    assert {finding["category"] for finding in written} == set(CATEGORIES)


def test_risk_scores_are_integers_or_floats():
    samples = sample_findings(RandomStream(7), 10)
    for whole_numbers, expected in ((True, int), (False, float)):
        for finding in write_findings(samples, 0, processed_at="", whole_numbers=whole_numbers):
            assert type(finding["risk_score"]) is expected


def test_ids_contain_shard_and_position():
    samples = sample_findings(RandomStream(7), 300)
    written = list(write_findings(samples, 0xAB, processed_at="", whole_numbers=True))
    assert all(finding["id"].endswith(f"_00ab{n:04x}") for n, finding in enumerate(written))
