"""Parts of the document from findings with known values."""

import pytest

from commands.analyze import report_schema
from commands.analyze.assessment.scored_finding import score_finding
from datamodules.records import Correlation, Finding


def make(name="a", severity="high", risk=70.0, category="network"):
    return Finding(name, f"Title {name}", "Text", category, severity, risk, risk, {"pid": 3})


def test_a_finding_refers_to_every_correlation_that_contains_it():
    findings = [score_finding(make(name), None) for name in "ab"]
    correlations = [Correlation("c1", "T", "", "x", None, ["a", "b"]), Correlation("c2", "T", "", "x", None, ["a"])]
    first, second = report_schema.enriched_findings(findings, correlations)
    assert (first["correlation_refs"], first["graph_degree"]) == (["c1", "c2"], 2)
    assert (second["correlation_refs"], second["graph_degree"]) == (["c1"], 1)
    assert first["metadata"] == {"pid": 3}
    assert "rationale" not in first


def test_optional_properties_of_a_correlation_are_left_out():
    record = report_schema.correlation_record(Correlation("c", "T", "Why", "x", None, ["a"]))
    assert record["rationale"] == "Why"
    assert not record.keys() & {"risk_score", "risk_score_delta"}
    record = report_schema.correlation_record(
        Correlation("c", "T", "Why", "x", None, ["a"], risk_score=55.5, risk_score_delta=2.4)
    )
    assert (record["risk_score"], record["risk_score_delta"]) == (56, 2)


def test_reductions_count_categories_and_give_the_highest_risk():
    findings = [make("a", "high", 70.0, "suid"), make("b", "low", 20.0, "suid"), make("c", "low", 90.0, "ioc")]
    reductions = report_schema.reductions(findings)
    assert reductions["suid_summary"] == {"findings": 2, "by_severity": {"low": 1, "high": 1}}
    assert "network_summary" not in reductions
    assert list(reductions["top_risks"]["highest_by_category"].items()) == [("ioc", 90), ("suid", 70)]


@pytest.mark.parametrize(("value", "expected"), [(-3.0, 0), (55.4, 55), (100.6, 100)])
def test_scores_are_integers_from_0_to_100(value, expected):
    assert report_schema.whole_number(value) == expected
