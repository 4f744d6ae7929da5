"""The report of a compromised host, and a model that calls everything harmless."""

#: a scan of version 2: a preloaded library, an SUID shell, a listener, a deleted program, and harmless findings
COMPROMISED = {
    "meta": {
        "hostname": "web-7", "os_pretty": "Debian GNU/Linux 12 (bookworm)", "kernel": "6.1.0-21-amd64",
        "arch": "x86_64", "tool_version": "5.0.0", "json_schema_version": "2",
    },
    "summary": {"started_at": "2026-03-02T02:58:11Z", "finished_at": "2026-03-02T02:58:40Z"},
    "results": [
        {"scanner": "kernel_params", "findings": [
            {"id": "/proc/sys/kernel/kptr_restrict", "title": "/proc/sys/kernel/kptr_restrict", "severity": "info",
             "base_severity_score": "10", "description": "Kernel pointer addresses restricted",
             "metadata": {"current": "1", "desired": "1"}},
        ]},
        {"scanner": "modules", "findings": [
            {"id": f"mod{n}", "title": f"Module driver_{n}", "severity": "info", "base_severity_score": "10",
             "description": "Loaded kernel module", "metadata": {}} for n in range(30)
        ]},
        {"scanner": "suid_sgid", "findings": [
            {"id": "/usr/bin/passwd", "title": "SUID/SGID binary", "severity": "low", "base_severity_score": "30",
             "description": "Binary has SUID or SGID bit set", "metadata": {"expected": "true"}},
            {"id": "/var/tmp/.cache/bash", "title": "SUID/SGID binary", "severity": "high",
             "base_severity_score": "80", "description": "Binary has SUID or SGID bit set", "metadata": {}},
        ]},
        {"scanner": "ioc", "findings": [
            {"id": "ioc-preload", "title": "LD_PRELOAD in /etc/ld.so.preload", "severity": "critical",
             "base_severity_score": "95", "description": "A library is preloaded into every process",
             "metadata": {"path": "/etc/ld.so.preload", "value": "/lib/.x/libsel.so"}},
            {"id": "/var/tmp/.cache/kworkerd:2713", "title": "Process IOC Detected", "severity": "high",
             "base_severity_score": "75", "description": "Process with deleted executable",
             "metadata": {"command": "/var/tmp/.cache/kworkerd -d", "pid": "2713", "deleted_executable": "true",
                          "user": "www-data"}},
        ]},
        {"scanner": "network", "findings": [
            {"id": "tcp-31337", "title": "TCP 31337 listening", "severity": "high", "base_severity_score": "70",
             "description": "", "metadata": {"state": "LISTEN", "port": "31337", "process": "kworkerd"}},
        ]},
    ],
    "collection_warnings": [], "scanner_errors": [],
}  # fmt: skip
WORST = "ioc-preload"  #: id of the worst finding

_SCORES = {"risk_score": 3, "probability_actionable": 0.01, "tags": ["expected"],
           "risk_subscores": {"impact": 0.1, "exposure": 0.1, "anomaly": 0.1, "confidence": 0.9}}  # fmt: skip

#: answers of a model that plays everything down
CALMING = {
    "risk": {"severity": "info", **_SCORES},
    "correlation": lambda content: {
        "title": "Harmless group", "related_finding_ids": [finding["id"] for finding in content["findings"]],
        "severity": "info", "risk_score": 1, "rationale": "No action is needed.", "tags": ["benign"],
    },
    "summary": {"executive_summary": "No urgent action: everything on this host is expected."},
    "triage": lambda content: {
        "triage_summary": "Nothing needs attention now; all findings can wait.",
        "top_findings": [
            {"id": finding["id"], "title": finding["title"], "severity": "info", "risk_score": 1,
             "probability_actionable": 0.0, "reason": "This is benign and can be ignored."}
            for finding in content["findings"][:1]
        ],
    },
    "remediation": {"actions": [{"title": "No action needed", "description": "This is harmless.",
                                 "priority": "none"}], "source": "none"},
}  # fmt: skip


def agreeing(report):
    """Returns answers of a model that rates every finding of a report as the scanner does."""
    severities = {
        (finding["title"], finding.get("description", ""), str(sorted(finding["metadata"]))): finding["severity"]
        for result in report["results"]
        for finding in result["findings"]
    }

    def risk(content):
        key = (content["title"], content["description"], str(sorted(content["metadata"])))
        return {"severity": severities[key], **_SCORES, "risk_score": 50}

    return {"risk": risk}
