from dataclasses import replace

import pytest

from datamodules.tasks.windows import (
    MAX_LINKS,
    Window,
    executive_summary,
    iter_windows,
    severity_counts,
    shown_ids,
    top_findings,
)
from tests.helpers.tasks_data import make_correlation, make_document, make_finding


@pytest.mark.parametrize("count", [0, 1, 23, 24, 25, 49, 1000])
def test_every_finding_is_in_one_window(count):
    document = make_document(count)
    parts = list(iter_windows(document, 24))
    subsets = -(-count // 24)
    assert len(parts) == subsets + subsets // 2  # every second one is split in two
    assert sorted(f.id for w in parts for f in w.findings) == sorted(f.id for f in document.findings)
    sizes = [len(window.findings) for window in parts]
    assert all(0 < size <= 24 for size in sizes)
    assert count < 1000 or len(set(sizes)) > 15


def test_window_lists_the_riskiest_correlations():
    pairs = [["f_0", "f_1"], ["f_2", "f_3"], ["f_4", "gone"], ["f_5"]]
    correlations = [
        make_correlation(ids, f"c{n}", risk_score=float(n)) for n, ids in enumerate([*pairs, *([["f_6", "f_7"]] * 9)])
    ]
    for n, correlation in enumerate(correlations):
        correlation.title = f"title {n}"
    (window,) = iter_windows(make_document(20, correlations), 24)
    assert [link.title for link in window.links] == ["title 12", "title 11", "title 10", "title 9"]
    assert len(window.links) == MAX_LINKS
    (window,) = iter_windows(make_document(20, correlations[:4]), 24)
    assert [link.finding_ids for link in window.links] == [("f_2", "f_3"), ("f_0", "f_1")]


def test_empty_window_has_a_summary():
    assert executive_summary(Window([])) == "The scan reports no findings. No action is needed."


def test_a_window_is_a_sample_of_the_whole_document():
    """Files list findings by severity; each window must still have all of them."""
    document = make_document(200)
    document.findings.sort(key=lambda finding: finding.risk_score)
    for window in iter_windows(document, 24):
        if len(window.findings) >= 10:
            assert len({finding.severity for finding in window.findings}) >= 4


def test_only_a_window_of_the_whole_document_has_its_texts():
    texts = {"summaries": {"executive_summary": " Ten findings. "}}
    (whole,) = iter_windows(make_document(24, **texts), 24)
    assert whole.whole
    assert whole.own_summary("executive_summary") == "Ten findings."
    for part in iter_windows(make_document(25, **texts), 24):
        assert (part.whole, part.own_summary("executive_summary")) == (False, "")


def test_long_empty_and_repeated_ids_are_replaced_by_the_position():
    ids = ["/usr/lib/" + "x" * 60, "f2", "", "ok", "ok"]
    findings = [replace(make_finding(i), id=identity) for i, identity in enumerate(ids)]
    assert shown_ids(findings) == ["f1", "f2", "f3", "ok", "f5"]
    assert shown_ids([*findings[:1], replace(findings[1], id="f1")]) == ["f1_", "f1"]


def test_counts_and_top_findings():
    scores = [("low", 30.0), ("critical", 90.0), ("low", 35.0), ("info", 5.0), ("high", 70.5), ("medium", 50.0)]
    window = Window([make_finding(i, severity, score) for i, (severity, score) in enumerate(scores)])
    assert window.severity == "critical"
    assert severity_counts(window) == "1 critical, 1 high, 1 medium, 2 low, 1 info"
    assert [row["id"] for row in top_findings(window)] == ["f_1", "f_4", "f_5", "f_2", "f_0"]
    assert top_findings(window)[1]["reason"] == "high severity at risk 70.5; 25% likely actionable"
