"""Lowered severities, calming sentences, and reports whose findings can't be read."""

import pytest

from commands.analyze.assessment.trust import count_visible, counts_text, is_calming, is_lowered, require_readable
from datamodules.errors import UserError
from datamodules.records import SEVERITIES
from datamodules.sources.scanner_report import read_report

LOWERED = {
    ("critical", "medium"), ("critical", "low"), ("critical", "info"), ("high", "medium"), ("high", "low"),
    ("high", "info"), ("medium", "info"),
}  # fmt: skip


@pytest.mark.parametrize("scanner", SEVERITIES)
def test_lowered_means_two_levels_or_below_high(scanner):
    assert {(scanner, model) for model in SEVERITIES if is_lowered(scanner, model)} == {
        pair for pair in LOWERED if pair[0] == scanner
    }
    assert not is_lowered(scanner, None)


@pytest.mark.parametrize(
    "text",
    [
        "No urgent action: cover it in routine hardening.", "No action is needed.", "Nothing needs attention now.",
        "This is harmless.", "All findings can wait.", "0 of 3 findings need attention now.",
        "There is no threat here.",
        "The host is safe.", "Everything looks normal.", "You can safely ignore it.", "This isn't a real problem.",
        "It does not require any action.", "Probably a false positive.", "There are no\nserious issues.",
        "None of these findings is critical.", "Low-risk findings only.", "The finding is informational.",
    ],
)  # fmt: skip
def test_calming_sentences_are_recognised(text):
    assert is_calming(text)


@pytest.mark.parametrize(
    "text",
    [
        "Isolate the host and start incident response today, beginning with LD_PRELOAD.",
        "3 findings: 1 critical, 1 high, 1 medium.", "Start with ioc2: Suspicious LD_PRELOAD (risk 90).",
        "2 of 3 findings need attention now; 1 needs a fix in the next maintenance window.",
        "Plan fixes for the next maintenance window, beginning with SUID /usr/bin/pppd.",
    ],
)  # fmt: skip
def test_the_projects_own_sentences_are_not_calming(text):
    assert not is_calming(text)


def test_counts_start_with_the_highest_severity():
    assert counts_text(["low", "high", "low"]) == "1 high, 2 low"


FINDING = {"title": "T", "severity": "high", "metadata": {}}


@pytest.mark.parametrize(
    ("report", "visible"),
    [
        ({"results": []}, 0),
        ({"results": [{"scanner": "x", "findings": []}], "summary": {"finding_count_total": 0}}, 0),
        ({"results": [{"scanner": "x", "finding_count": 4}]}, 4),
        ({"results": [], "summary": {"finding_count_total": 7}}, 7),
        ({"results": [], "summary": {"finding_count_total": "8", "finding_count_emitted": None}}, 8),
        ({"enriched_findings": [], "raw_reference": {"results": [{"findings": [FINDING, FINDING]}]}}, 2),
        ({"findings": [], "other": {"ioc": [FINDING]}}, 1),
    ],
)
def test_visible_findings_are_counted_anywhere(report, visible):
    assert count_visible(report) == visible


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"results": [{"scanner": "x", "findings": [7]}]}, "none of its 1 findings is usable; number 1"),
        ({"results": [{"scanner": "x", "finding_count": 4}]}, "none of its 4 findings could be read"),
        ({"results": [], "summary": {"finding_count_total": 3}}, "none of its 3 findings could be read"),
        ({"findings": [], "nested": {"deep": [FINDING]}}, "none of its 1 findings could be read"),
    ],
)
def test_a_report_whose_findings_are_unreadable_is_an_error(report, message):
    with pytest.raises(UserError, match=message):
        require_readable(report, read_report(report), "--report r.json")


@pytest.mark.parametrize("report", [{"results": []}, {"results": [{"scanner": "x", "findings": [FINDING]}]}])
def test_an_empty_or_readable_report_is_no_error(report):
    require_readable(report, read_report(report), "--report r.json")
