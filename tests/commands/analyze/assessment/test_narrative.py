"""Texts of an analysis: none calms while a severity is medium or above."""

import pytest

from commands.analyze.assessment import narrative
from commands.analyze.assessment.narrative import Overview
from commands.analyze.assessment.scored_finding import rank, score_finding
from commands.analyze.assessment.trust import LEVELS, higher, is_calming
from datamodules.records import SEVERITIES, Finding
from datamodules.tasks.windows import Link

RISK = {"info": 10.0, "low": 30.0, "medium": 50.0, "high": 70.0, "critical": 90.0}


def scored(name, scanner, model=None, trust="higher"):
    finding = Finding(name, f"Title {name}", "", "ioc", scanner, RISK[scanner], RISK[scanner], {})
    return score_finding(finding, model and {"severity": model, "risk_score": RISK[model]}, trust)


def overview(*findings, **options):
    return Overview(sorted(findings, key=rank), **options)


@pytest.mark.parametrize("trust", ["scanner", "model", "higher"])
@pytest.mark.parametrize("scanner", SEVERITIES)
@pytest.mark.parametrize("model", SEVERITIES)
def test_texts_calm_only_below_medium(scanner, model, trust):
    view = overview(scored("a", scanner, model, trust), scored("b", "info", "info", trust))
    calm = LEVELS[higher(scanner, model)] < LEVELS["medium"]
    assert view.may_calm == calm
    assert is_calming(narrative.executive(view)) == calm
    if not calm:
        assert not is_calming(narrative.triage(view))
        assert "Start with a: Title a" in narrative.triage(view)
        assert "Title a" in narrative.recommendation(view)


def test_the_summary_has_counts_disagreement_risks_links_and_advice():
    view = overview(scored("a", "critical", "low"), scored("b", "high", "high"), scored("c", "info"),
                    links=[Link("Together", "high", 70, ("a", "b"))])  # fmt: skip
    assert narrative.executive(view) == (
        "3 findings: 1 critical, 1 high, 1 info. The model lowers 1 of them against the scanner, which rates them "
        "1 critical: check each before relying on the model. Top risks: Title a (risk 90); Title b (risk 70); Title c "
        "(risk 10). Correlated: Together (2 findings). Isolate the host and start incident response today, beginning "
        "with Title a."
    )
    assert narrative.triage(view) == ("2 of 3 findings need attention now. Start with a: Title a (risk 90).")


def test_the_triage_counts_findings_to_plan():
    view = overview(scored("a", "medium"), scored("b", "low"))
    assert narrative.triage(view).startswith("1 of 2 findings needs a fix in the next maintenance window.")
    view = overview(scored("a", "medium"), scored("b", "high"))
    assert narrative.triage(view).startswith("1 of 2 findings needs attention now; 1 needs a fix in the next")


def test_skipped_and_unread_parts_prevent_calm():
    skipped = {"worst": {"severity": "critical", "title": "Preload", "id": "x"}}
    view = overview(scored("a", "info"), skipped=skipped)
    assert not view.may_calm
    assert (
        narrative.triage(view)
        == narrative.recommendation(view)
        == ("Analyse the skipped findings: the scanner rates one of them critical, Preload.")
    )
    assert "The scan is incomplete" in narrative.executive(overview(scored("a", "info"), unread=2))
    assert narrative.executive(overview(unread=1)).startswith("The scan reports no findings. The scan is incomplete")
    assert narrative.executive(overview()) == "The scan reports no findings. No action is needed."


def test_a_models_text_is_acceptable_unless_it_calms():
    view = overview(scored("a", "high", "low"))
    assert narrative.acceptable("Look at Title a first.", view)
    assert not narrative.acceptable("This is harmless.", view)
    assert narrative.acceptable("This is harmless.", overview(scored("a", "low", "low")))


def test_a_summary_without_the_highest_severity_gets_a_lead():
    view = overview(scored("a", "high", "low"))
    assert narrative.lead(view, "One finding.") == "Highest severity: high, Title a. "
    assert narrative.lead(view, "One High finding.") == ""
    assert narrative.lead(view, "The highest risk is 70.") != ""


def test_the_reason_has_both_severities():
    assert narrative.reason(scored("a", "high", "low"), [Link("Pair", None, None, ("a", "b"))], "a") == (
        "the model lowers it from high to low; part of: Pair"
    )
    assert narrative.reason(scored("a", "low", "high"), [], "a") == "the model raises it from low to high"
    assert narrative.reason(scored("a", "low", "low"), [], "a") == "low by the scanner and the model"
    assert narrative.reason(scored("a", "low"), [], "a") == "low by the scanner"
