"""Scanner reports of both versions."""

import json

import pytest

from datamodules.errors import UserError
from datamodules.sources.scanner_report import read_report
from tests.helpers.findings_data import finding

VERSION_2 = {
    "meta": {}, "results": [
        {"scanner": "ioc", "findings": [{"id": "i", "title": "x", "severity": "high", "risk_score": "70"}]},
        {"scanner": "mounts", "findings": []}, {"scanner": "auditd", "findings": None}, "text",
        {"scanner": "suid_sgid", "findings": [{"id": "s", "title": "x", "base_severity_score": "30"}]},
        {"scanner": 3, "findings": [{"id": "u", "title": "x", "severity": "low"}]},
    ],
}  # fmt: skip


def test_version_2_names_the_category_by_scanner():
    parsed = read_report(VERSION_2, "host.json")
    assert [(f.id, f.category, f.severity, f.risk_score) for f in parsed.document.findings] == [
        ("i", "ioc", "high", 70.0),
        ("s", "suid", "low", 30.0),
        ("u", "unknown", "low", 30.0),
    ]
    assert [(q.source, q.reason, q.record) for q in parsed.quarantined] == [("host.json", "not_an_object", '"text"')]
    assert read_report({"results": []}).document.findings == []


def test_version_3_has_findings_and_correlations():
    parsed = read_report(
        {
            "fact_pack_version": "3",
            "findings": [finding(0, "medium", category="kernel_param") | {"severity": "error"}],
            "correlations": [{"id": "c", "title": "t", "rationale": "why", "related_finding_ids": ["f0"]}],
        }
    )
    assert parsed.document.findings[0].category == "kernel_params"
    assert parsed.document.findings[0].severity == "medium"  # from its score of 50
    assert parsed.document.correlations[0].finding_ids == ["f0"]


def test_a_batch_and_ground_truth_are_read_too():
    batch = {"data": {"findings": {"dns": {"low": [finding(0)]}}, "correlations": []}}
    truth = {"enriched_findings": [finding(1)], "summaries": {"executive_summary": "One."}}
    assert [f.id for f in read_report(batch).document.findings] == ["f0"]
    assert read_report(truth).document.summaries == {"executive_summary": "One."}


def test_records_are_checked_as_those_of_a_tolerant_parser():
    records = [finding(0, metadata={"x": float("nan")}), finding(1)]
    parsed = read_report({"findings": records})
    assert [f.id for f in parsed.document.findings] == ["f1"]
    assert [q.reason for q in parsed.quarantined] == ["non_finite"]


@pytest.mark.parametrize("value", [{"a": 1}, [], None, "text", {"generation_stats": {}}, finding(0)])
def test_another_value_is_a_user_error(value):
    with pytest.raises(
        UserError, match=r"^--report x.json: no scanner report .*\. Fix: give the scanner's JSON output$"
    ):
        read_report(value, "--report x.json")


@pytest.mark.parametrize(
    ("name", "findings"), [("host_scan", 234), ("malicious1", 3), ("sample1", 2), ("sample2", 1), ("sample3", 0)]
)
def test_real_reports(name, findings, shared_data):
    report = json.loads((shared_data / "reports" / f"{name}.json").read_bytes())
    parsed = read_report(report)
    assert len(parsed.document.findings) == findings
    assert not parsed.quarantined
    assert all(0 < record.risk_score <= 100 for record in parsed.document.findings)
