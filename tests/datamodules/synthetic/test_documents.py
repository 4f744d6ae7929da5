"""The documents of both layouts: correlations, summaries, statistics and indexes agree with the findings."""

import json
from collections import Counter, defaultdict

import jsonschema
import orjson
import pytest

from datamodules.synthetic import ground_truth_labels, iter_documents
from datamodules.synthetic.labeling_rules import TABLES
from tests.helpers.synthetic_data import correlations_of, findings_of


@pytest.mark.parametrize("layout", ["batch", "ground_truth"])
def test_the_findings_of_a_correlation_share_a_key(layout):
    types = Counter()
    for document in iter_documents(6000, 8, layout=layout, findings_per_shard=3000):
        present = {f["id"]: f for f in findings_of(document)}
        references = defaultdict(list)
        for correlation in correlations_of(document):
            ids = correlation["related_finding_ids" if layout == "ground_truth" else "correlation_refs"]
            members = [present[identifier] for identifier in ids]
            assert len(members) == len(set(ids)) >= 2
            assert any(len({str(m["metadata"].get(key)) for m in members}) == 1 for key in ("pid", "path"))
            assert any(m["tags"][0] != "expected" for m in members)
            worst = max(ground_truth_labels(m)["risk_score"] for m in members)
            assert correlation["risk_score_delta"] == min(worst + 20, 99) - worst
            types[correlation["correlation_type"]] += 1
            for identifier in ids:
                references[identifier].append(correlation["id"])
        assert all(sorted(f["correlation_refs"]) == sorted(references[f["id"]]) for f in present.values())
    assert set(types) == set(TABLES["correlations"])


def test_ground_truth_documents_validate(shared_data):
    path = shared_data / "ground_truth_schema.json"
    validator = jsonschema.Draft202012Validator(json.loads(path.read_text()))
    for count in (1, 40, 800):
        (document,) = iter_documents(count, 3, layout="ground_truth")
        validator.validate(json.loads(orjson.dumps(document)))


def test_summaries_and_actions_agree_with_the_findings():
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


def test_statistics_and_indexes_agree_with_the_findings():
    (document,) = iter_documents(1200, 6)
    data, findings = document["data"], findings_of(document)
    assert data["statistics"]["severity_distribution"] == Counter(f["severity"] for f in findings)
    assert data["statistics"]["category_distribution"] == Counter(f["category"] for f in findings)
    assert data["statistics"]["total_correlations"] == len(data["correlations"])
    assert set(data["indexes"]["findings_by_id"]) == {f["id"] for f in findings}
    for category, by_severity in data["findings"].items():
        for severity, group in by_severity.items():
            assert all((f["category"], f["severity"]) == (category, severity) for f in group)
