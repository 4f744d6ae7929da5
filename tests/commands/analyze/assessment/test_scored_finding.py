"""Scores of a finding by ``--trust``, and the findings that a model lowers."""

import pytest

from commands.analyze.assessment.scored_finding import (
    ceiling,
    lowered_findings,
    rank,
    score_finding,
    worst_severity,
)
from datamodules.records import Finding

ANSWER = {
    "severity": "low", "risk_score": 31.6, "probability_actionable": 0.2, "tags": ["a"],
    "risk_subscores": {"impact": 0.1, "exposure": 0.2, "anomaly": 0.3, "confidence": 0.4},
}  # fmt: skip


def make(name="a", severity="high", risk=70.0, category="network"):
    return Finding(name, f"Title {name}", "Text", category, severity, risk, risk, {"pid": 3})


def scored(name, scanner, model, trust="higher", **answer):
    answers = None if model is None else {"severity": model, "risk_score": 20, **answer}
    return score_finding(make(name, scanner), answers, trust)


def test_with_trust_in_the_model_its_answer_replaces_the_scanners_values():
    finding = score_finding(make(), ANSWER, "model")
    assert {name: getattr(finding, name) for name in ANSWER} == ANSWER
    assert (finding.scanner_severity, finding.answered_by, finding.base_severity_score) == ("high", "model", 70.0)
    assert finding.severity_source == "model"


@pytest.mark.parametrize(
    ("trust", "scanner", "model", "severity", "source"),
    [
        ("higher", "high", "low", "high", "scanner"),
        ("higher", "low", "high", "high", "model"),
        ("higher", "low", "low", "low", "model"),
        ("scanner", "low", "high", "low", "scanner"),
        ("model", "critical", "info", "info", "model"),
        ("model", "critical", None, "critical", "rule"),
    ],
)
def test_trust_selects_the_severity(trust, scanner, model, severity, source):
    finding = scored("a", scanner, model, trust)
    assert (finding.severity, finding.severity_source) == (severity, source)
    assert (finding.scanner_severity, finding.model_severity) == (scanner, model)


def test_the_higher_risk_score_counts_and_a_raised_finding_keeps_no_low_probability():
    finding = score_finding(make(), ANSWER, "higher")
    assert (finding.risk_score, finding.scanner_risk, finding.model_risk) == (70.0, 70.0, 31.6)
    assert finding.probability_actionable == 0.7
    assert score_finding(make(severity="low", risk=20.0), ANSWER, "higher").probability_actionable == 0.2


def test_without_an_answer_the_scanners_values_are_kept():
    finding = score_finding(make(), None)
    assert (finding.severity, finding.risk_score, finding.probability_actionable) == ("high", 70.0, 0.7)
    assert set(finding.risk_subscores.values()) == {0.7}
    assert (finding.tags, finding.answered_by) == (["network"], "rule")
    assert finding.model_severity is None


def test_lowered_findings_are_ordered_by_the_scanner_and_have_the_models_reason():
    findings = [
        scored("a", "high", "medium", rationale=["One.", "Two."]),
        scored("b", "critical", "info"),
        scored("c", "critical", "high"),
        scored("d", "critical", None),
    ]
    lowered = lowered_findings(findings)
    assert lowered["count"] == 2
    assert [row["id"] for row in lowered["findings"]] == ["b", "a"]
    assert lowered["findings"][1] == {
        "id": "a", "scanner_severity": "high", "model_severity": "medium", "reason": "One. Two.",
    }  # fmt: skip
    assert "reason" not in lowered["findings"][0]


def test_the_worst_severity_is_the_scanners_or_the_models_or_that_of_a_skipped_finding():
    findings = [scored("a", "low", "medium", "scanner"), scored("b", "low", "info", "model")]
    assert [ceiling(finding) for finding in findings] == ["medium", "low"]
    assert worst_severity(findings) == "medium"
    assert worst_severity(findings, {"worst": {"severity": "high"}}) == "high"
    assert worst_severity([]) == "info"


def test_the_ranking_is_by_severity_before_risk():
    findings = [scored("a", "low", None), scored("c", "high", None), scored("b", "high", None)]
    assert [finding.id for finding in sorted(findings, key=rank)] == ["b", "c", "a"]
