"""The labels of generated findings follow the stated rules, and cannot be found by a look-up."""

import json
from collections import Counter, defaultdict

import pytest

from datamodules.records import BASELINE_STATUSES, SEVERITIES, SUBSCORES
from datamodules.synthetic import correlate, ground_truth_labels, iter_documents
from datamodules.synthetic.labeling_rules import Features, correlation_type, labels_of
from tests.helpers.synthetic_data import findings_of, generate_findings


def test_labels_follow_the_rules_within_the_stated_noise(findings):
    noise = Counter()
    for finding in findings:
        answer = ground_truth_labels(finding)
        for name in ("severity", "tags", "baseline_status", "base_severity_score"):
            assert finding[name] == answer[name]
        assert finding.get("rationale") == answer.get("rationale")
        assert abs(finding["risk_score"] - answer["risk_score"]) <= 3
        assert SEVERITIES[min(int(finding["risk_score"] // 20), 4)] == finding["severity"]  # not changed by the noise
        assert finding["risk_total"] == finding["risk_score"]
        assert finding["probability_actionable"] == pytest.approx(answer["probability_actionable"], abs=0.0201)
        for name in SUBSCORES:
            assert finding["risk_subscores"][name] == pytest.approx(answer["risk_subscores"][name], abs=0.0201)
            assert 0 <= finding["risk_subscores"][name] <= 1
        noise[finding["risk_score"] - answer["risk_score"]] += 1
        assert len(finding["tags"]) <= 4
        assert finding["baseline_status"] in BASELINE_STATUSES
    assert set(noise) == set(range(-3, 4))  # the whole range of the noise occurs


def independent_severity(category, description, metadata):
    """The severity by the stated rules, from words and values, without the tables of the generator."""
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


def test_the_inputs_determine_the_severity(findings):
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
def test_a_lookup_by_one_field_does_not_determine_the_severity(findings, key, most):
    seen = defaultdict(Counter)
    for finding in findings[:9000]:
        seen[key(finding)][finding["severity"]] += 1
    held_out = generate_findings(3000, seed=4)
    guesses = [seen[key(f)].most_common(1)[0][0] if key(f) in seen else "info" for f in held_out]
    assert sum(guess == f["severity"] for guess, f in zip(guesses, held_out, strict=True)) / len(held_out) < most


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


def test_findings_of_other_sources_raise_an_error():
    with pytest.raises(ValueError, match="not written by this generator"):
        ground_truth_labels({"id": "f", "category": "mac", "description": "AppArmor detection", "metadata": {}})


def test_labels_of_stated_examples():
    """Two combinations, computed by hand from the formulas of the module."""
    known_bad_root_open = labels_of(Features(evidence=3, wording=2, privileged=1, exposed=1, mitigated=0))
    assert known_bad_root_open == (99, "critical", (85, 85, 91, 94), 99, ("known_bad", "privileged", "exposed"))
    mitigated = labels_of(Features(evidence=1, wording=0, privileged=0, exposed=0, mitigated=1))
    assert mitigated == (5, "info", (25, 15, 37, 78), 0, ("unusual", "mitigated"))


@pytest.mark.parametrize(
    ("key", "members", "expected"),
    [
        ("pid", [("processes", 2), ("network", 3)], "malware_c2"),
        ("pid", [("processes", 1), ("network", 3)], "process_network_suspicious"),
        ("pid", [("processes", 0), ("network", 1)], "unusual_port_usage"),
        ("pid", [("processes", 0), ("dns", 1)], "process_network_suspicious"),
        ("pid", [("processes", 0), ("network", 0)], None),
        ("pid", [("modules", 1), ("kernel_params", 0)], "module_kernel_conflict"),
        ("path", [("suid", 1), ("mac", 0)], "capabilities_weak_mac"),
        ("path", [("processes", 3), ("network", 3)], None),
        ("path", [("kernel_params", 1), ("kernel_params", 0)], "weak_kernel_security"),
    ],
)
def test_the_type_of_a_correlation(key, members, expected):
    assert correlation_type(key, members) == expected
