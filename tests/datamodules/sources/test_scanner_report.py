"""Scanner reports of versions 2, 3 and 4, and by category."""

import json

import pytest

from datamodules.errors import UserError
from datamodules.sources.decompression import loads
from datamodules.sources.scanner_report import raw_reference, read_report
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


def severities(report):
    return {f.id: (f.category, f.severity, f.risk_score) for f in read_report(report).document.findings}


def test_version_4_without_enrichment_has_its_findings_in_the_raw_scan():
    report = {"version": "ground_truth_v1", "enriched_findings": [], "raw_reference": VERSION_2}
    assert severities(report) == severities(VERSION_2)
    del report["enriched_findings"]
    assert severities(report) == severities(VERSION_2)


def test_in_version_4_the_scanners_severity_precedes_a_models():
    report = {
        "version": "ground_truth_v1",
        "enriched_findings": [finding(0, "info"), finding(1, "low"), finding(2, "high") | {"id": "f2"}],
        "correlations": [{"id": "c", "title": "t", "related_finding_ids": ["f0", "f1"]}],
        "summaries": {"executive_summary": "Calm."},
        "raw_reference": {"results": [{"scanner": "ioc", "findings": [finding(0, "critical"), finding(1, "medium")]}]},
    }
    document = read_report(report).document
    assert [(f.id, f.severity) for f in document.findings] == [("f0", "critical"), ("f1", "medium"), ("f2", "high")]
    assert document.correlations[0].finding_ids == ["f0", "f1"]
    assert document.summaries == {"executive_summary": "Calm."}


def test_an_earlier_analysis_is_read_with_the_scanners_severity():
    lowered = finding(0, "info") | {"risk_score": 5, "base_severity_score": 90, "scanner_severity": "critical"}
    report = {"version": "ground_truth_v1", "enriched_findings": [lowered, "text"], "raw_reference": {"file": "x.json"}}
    parsed = read_report(report)
    assert [(f.severity, f.risk_score) for f in parsed.document.findings] == [("critical", 90.0)]
    assert [q.reason for q in parsed.quarantined] == ["not_an_object"]


def test_raw_results_that_are_no_list_are_not_lost_silently():
    report = {"version": "ground_truth_v1", "enriched_findings": {}, "raw_reference": {"results": {"ioc": [1]}}}
    assert [q.reason for q in read_report(report).quarantined] == ["unknown_layout"]


def test_a_report_by_category():
    report = {
        "metadata": {"host": "h"}, "generated_at": "now", "ioc": [finding(0, "high")],
        "suid_sgid": {"low": [finding(1, "low")]}, "dns": [],
    }  # fmt: skip
    parsed = read_report({key: report[key] for key in report if key != "generated_at"})
    assert [(f.id, f.category) for f in parsed.document.findings] == [("f0", "processes"), ("f1", "network")]
    assert not parsed.quarantined
    bare = {"id": "x", "title": "t", "severity": "high"}
    assert severities({"suid_sgid": [bare]}) == {"x": ("suid", "high", 80.0)}
    assert [q.reason for q in read_report(report).quarantined] == ["unknown_layout"]  # the text is counted


@pytest.mark.parametrize("report", [VERSION_2, {"findings": [finding(0), finding(1)]}, {"ioc": [finding(0, "high")]}])
def test_the_raw_reference_is_a_version_4_report_with_the_same_findings(report):
    reference = raw_reference(report, read_report(report).document.findings)
    again = {"version": "ground_truth_v1", "enriched_findings": [], "raw_reference": reference}
    assert severities(again) == severities(report)
    assert raw_reference(again, []) == reference
    json.dumps(reference, allow_nan=False)


def test_the_raw_reference_holds_strict_json_only():
    text = (
        b'{"meta": {"x": NaN}, "results": [{"scanner": "a", "n": NaN, "findings": [{"id": "1", "risk_score": NaN}]}]}'
    )
    value, _ = loads(text)
    assert raw_reference(value, []) == {"results": [{"findings": []}]}


def test_a_repeated_key_can_hide_no_findings():
    value, _ = loads(b'{"results": [{"scanner": "ioc", "findings": [{"title": "x"}]}], "results": []}')
    with pytest.raises(UserError, match=r"--report x: the outermost object repeats a key\. Fix"):
        read_report(value, "--report x")
    value, _ = loads(b'{"results": [{"findings": [{"title": "x", "severity": "high"}], "findings": []}]}')
    assert [q.reason for q in read_report(value).quarantined] == ["duplicate_keys"]


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
