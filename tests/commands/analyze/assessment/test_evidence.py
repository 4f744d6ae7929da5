"""Evidence of findings, data of the host, and skipped parts."""

import pytest

from commands.analyze.assessment.evidence import evidence, host_of, scanner_failures, skipped_findings, skipped_lines
from datamodules.records import Finding


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"metadata": {"deleted": "true", "path": "/tmp/evil", "pid": "77"}}, {"path": "/tmp/evil", "pid": "77"}),
        ({"id": "/usr/bin/chage", "title": "SUID/SGID binary", "metadata": {}}, {"path": "/usr/bin/chage"}),
        ({"id": "/opt/x/y:4711", "metadata": {"command": "/opt/x/y -d"}},
         {"path": "/opt/x/y", "command": "/opt/x/y -d", "pid": "4711"}),
        ({"id": "n4", "title": "TCP 4444 listening", "metadata": {"state": "LISTEN"}},
         {"port": "4444", "state": "LISTEN"}),
        ({"id": "m", "title": "Module vfio_pci", "category": "modules", "metadata": {}}, {"module": "vfio_pci"}),
        ({"id": "p", "description": "Library /lib/.x/a.so is preloaded", "metadata": {"user": "root"}},
         {"path": "/lib/.x/a.so", "user": "root"}),
        ({"id": "x", "metadata": {"enabled": True, "profiles": 3}}, {"enabled": "true", "profiles": "3"}),
        ({"id": "x", "title": "SUID/SGID binary", "metadata": {}}, {}),
    ],
)  # fmt: skip
def test_evidence_comes_from_the_metadata_and_the_texts(record, expected):
    assert dict(evidence({"title": "", "description": "", "category": "ioc", "id": ""} | record)) == expected


def test_a_long_value_is_cut_and_the_number_of_values_is_limited():
    names = ("path", "command", "env", "value", "pid", "ppid", "port", "user", "module", "mode")
    found = evidence({"metadata": dict.fromkeys(names, "v" * 1000)})
    assert len(found) == 8
    assert max(len(value) for _, value in found) == 160


def test_the_host_is_read_from_every_version():
    meta = {"hostname": "h", "os_pretty": "Ubuntu 24.04", "kernel": "6.11", "tool_version": "5.0.0"}
    summary = {"started_at": "2025-09-15T19:46:11Z", "finished_at": "2025-09-15T19:46:14Z"}
    expected = {
        "host": "h", "operating system": "Ubuntu 24.04", "kernel": "6.11", "scanned": "2025-09-15T19:46:14Z",
        "scanner": "sys-scan 5.0.0",
    }  # fmt: skip
    assert host_of({"meta": meta, "summary": summary, "results": []}) == expected
    assert host_of({"enriched_findings": [], "raw_reference": {"meta": meta, "summary": summary}}) == expected
    version_3 = {"host_id": "h3", "generated_at": "2025-01-01T00:00:00Z", "findings": []}
    assert host_of(version_3) == {"host": "h3", "scanned": "2025-01-01T00:00:00Z"}
    assert host_of({"meta": {"os_id": "debian", "os_version": "12"}}) == {"operating system": "debian 12"}
    for odd in ([], "x", {"meta": 3, "summary": []}):
        assert host_of(odd) == {}


def test_failures_of_the_scanner_are_kept():
    report = {"scanner_errors": [{"scanner": "ioc", "message": "x"}], "collection_warnings": [{}, {}]}
    assert scanner_failures(report) == {
        "scanner_errors": ['{"scanner":"ioc","message":"x"}'], "collection_warnings": 2,
    }  # fmt: skip
    assert scanner_failures({"scanner_errors": [], "collection_warnings": "no list"}) == {}


def make(name, severity, risk):
    return Finding(name, f"Title {name}", "", "ioc", severity, risk, risk, {})


def test_skipped_findings_are_counted_and_the_worst_is_kept():
    skipped = skipped_findings([make("a", "info", 1), make("b", "high", 70), make("c", "high", 80)])
    assert skipped == {
        "findings": 3, "by_severity": {"high": 2, "info": 1},
        "worst": {"id": "c", "title": "Title c", "severity": "high"},
    }  # fmt: skip


def test_every_skipped_part_has_a_line():
    document = {
        "raw_reference": {
            "limit": 1, "skipped": skipped_findings([make("b", "high", 70)]), "unusable": [{}],
            "scanner_errors": ["failed"], "collection_warnings": 152,
        },
        "enriched_findings": [{"id": "a", "severity": "low"}], "actions": [],
    }  # fmt: skip
    lines = skipped_lines(document)
    assert lines[0].startswith("1 of 2 findings were not analysed (--limit 1); the scanner rates them 1 high.")
    assert [line.split()[0] for line in lines[1:]] == ["Records", "A", "Objects", "Findings"]
    assert lines[-1] == "Findings above info without an action here (--actions): 1 low."
    document["raw_reference"], document["actions"] = {}, [{"finding_ids": ["a"]}]
    assert skipped_lines(document) == ["Nothing was skipped."]
