"""Every command of the knowledge table: it parses, names its needs and its danger, and keeps evidence apart."""

import re
import shlex
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.records import Finding
from datamodules.tasks.remediation import (
    FAMILIES,
    NEW_EVIDENCE_FOLDER,
    commands_of_answers,
    evidence_folder,
    knowledge,
    remediate,
)
from datamodules.tasks.remediation_values import PLACEHOLDER, VALUES
from datamodules.tasks.schemas import MAX_COMMAND, MAX_NEED, MAX_NEEDS, MAX_STEP_LENGTH

ENTRIES = [entry for entries in knowledge().values() for entry in entries]
COMMANDS = [
    pytest.param(command, id=f"{entry.category}-{entry.kind or 'fallback'}-{number}")
    for entry in ENTRIES
    for number, command in enumerate(command for action in entry.actions for command in action["commands"])
]
BASH = shutil.which("bash")
SHELLCHECK = shutil.which("shellcheck")
needs_bash = pytest.mark.skipif(BASH is None, reason="needs bash")

VALUE = {
    "pid": "4347", "port": "4444", "ip": "203.0.113.7", "client_ip": "10.0.1.12", "domain": "a1.example.net",
    "user": "daemon", "module": "cramfs", "path": "/var/tmp/.cache/bash", "program": "/opt/app/bin/server",
    "mode": "4755", "library": "/tmp/inject.so", "planted_library": "/tmp/inject.so", "parameter": "rp_filter",
    "evidence": "/root/evidence/ioc-1-0123456789ab",
}  # fmt: skip

#: program that a command runs -> what it needs; None for programs that each distribution of both families installs
PROGRAMS = {
    **dict.fromkeys(
        ["awk", "cat", "chage", "chgrp", "chmod", "chown", "command", "cp", "cut", "date", "dmesg", "echo", "file",
         "find", "findmnt", "getent", "grep", "head", "install", "last", "lastb", "ls", "lsblk", "mktemp", "mount",
         "mv", "printf", "ps", "readlink", "reboot", "rm", "sed", "sha256sum", "sleep", "stat", "sysctl", "tail", "tee",
         "test", "timeout", "tr", "kill", "usermod", "visudo", "sudo"]
    ),
    **dict.fromkeys(["apt", "apt-get", "dpkg", "needrestart", "update-grub"], "debian"),
    **dict.fromkeys(["dnf", "grubby", "rpm"], "rhel"),
    **dict.fromkeys(["journalctl", "loginctl", "resolvectl", "systemctl", "systemd-analyze", "systemd-run"], "systemd"),
    **dict.fromkeys(["aa-complain", "aa-enforce", "aa-unconfined", "aa-status"], "apparmor"),
    **dict.fromkeys(["getenforce", "restorecon", "sestatus", "setenforce"], "selinux"),
    **dict.fromkeys(["auditctl", "augenrules", "aureport", "ausearch"], "audit"),
    **dict.fromkeys(["lsmod", "modinfo", "modprobe"], "kmod"), **dict.fromkeys(["getcap", "setcap"], "libcap"),
    **dict.fromkeys(["dig", "delv"], "dnsutils"), **dict.fromkeys(["ip", "ss"], "iproute2"),
    "bpftool": "bpftool", "crontab": "cron", "faillock": "pam", "fuser": "psmisc", "gradm": None, "lspci": "pciutils",
    "named-checkconf": "bind", "nft": "nftables", "nmcli": "networkmanager", "rfkill": "rfkill", "sshd": "openssh",
    "tcpdump": "tcpdump", "unbound-checkconf": "unbound", "usbguard": "usbguard", "whois": "whois",
}  # fmt: skip
NEEDS = {*FAMILIES, *filter(None, PROGRAMS.values())} | {
    "needrestart",
    "dnf-utils",
    "apparmor-utils",
    "rsyslog",
    "file",
}

#: commands that can lock the operator out, stop a service, change an account or destroy evidence
DANGEROUS = re.compile(
    r"policy drop|\bdrop\b'|\bip link\b.* down|isolate rescue|\brm\b|\bchattr\b|\b(user|group)(del|mod)\b|\bkill\b|"
    r"\breboot\b|\bshutdown\b|modprobe (-r|--remove)|\brmmod\b|net\.ipv[46]\.|kernel\.(panic|kexec|modules)|userns|"
    r"namespaces = 0|io_uring|\bchown\b|"
    r"systemctl (disable|stop|restart|reload|isolate|mask|enable --now)|terminate-user|"
    r"chage -d|setenforce|SELINUX=|aa-enforce|remount|setcap|chmod (\S*[ug]-s|000|o-rx)|\bmv\b|--reinstall|"
    r"dnf (reinstall|remove)|apt-get (remove|purge|upgrade)|dnf upgrade --security|rfkill block|sig_enforce|"
    r"augenrules|sshd_config|always_nxdomain"
)


def fill(text):
    return PLACEHOLDER.sub(lambda match: VALUE[match[1]], text)


def texts(command):
    return [command[key] for key in ("command", "undo") if key in command]


def programs(command):
    """The names of the programs that a shell command runs, those inside of ``$(...)`` too."""
    command = re.sub(r"[0-9]?>/dev/null", "", command)
    found = []
    while inner := re.search(r"\$\(([^()]*)\)", command):
        found += programs(inner[1])
        command = command.replace(inner[0], "x")
    command = re.sub(r"'[^']*'|\"(?:\\.|[^\"\\])*\"", "x", command)
    for part in re.split(r"&&|\|\||[;|]", command):
        words = [word for word in part.split() if not re.fullmatch(r"[a-z]+=\S*", word)]
        while words and words[0] in ("do", "sudo", "for", "done"):
            words = [] if words[0] in ("for", "done") or words[1:2] == ["-l"] else words[1:]
        found += words[:1]
    return found


@needs_bash
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    for text in map(fill, texts(command)):
        result = subprocess.run([BASH, "-n", "-c", text], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, ""), text


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck")
def test_shellcheck_finds_no_fault(tmp_path):
    scripts = []
    for number, command in enumerate(param.values[0] for param in COMMANDS):
        for text in map(fill, texts(command)):
            scripts.append(tmp_path / f"{number}-{len(scripts)}.sh")
            scripts[-1].write_text(f"#!/bin/bash\n{text}\n")
    # SC2015: A && B || C is not if-then-else. SC2009: pgrep prints no start time. Neither is a fault here.
    excluded = "--exclude=SC2009,SC2015"
    result = subprocess.run(
        [SHELLCHECK, "--severity=warning", excluded, *map(str, scripts)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_known_programs_and_names_what_they_need(command):
    needs = command["needs"]
    assert needs[0] in FAMILIES
    assert not set(needs[1:]) & set(FAMILIES)
    assert set(needs) <= NEEDS
    assert len(needs) == len(set(needs)) <= MAX_NEEDS
    assert all(len(need) <= MAX_NEED for need in needs)
    for text in texts(command):
        for program in programs(fill(text)):
            assert program in PROGRAMS, f"{program!r} of {text}"
            if PROGRAMS[program] is not None:
                assert PROGRAMS[program] in needs, text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dangerous_command_says_so_and_how_to_undo_it(command):
    if DANGEROUS.search(command["command"]):
        assert command.get("danger"), command["command"]
    if "danger" in command:
        assert len(command["danger"]) <= MAX_STEP_LENGTH
        assert command["danger"].endswith(".")
        assert ("undo" in command) != ("Cannot be undone" in command["danger"]), command["danger"]
    assert len(command.get("undo", "")) <= MAX_COMMAND


@pytest.mark.parametrize(
    "command",
    [
        "sudo nft add chain inet q out '{ type filter hook output priority 0; policy drop; }'",
        "sudo ip link set dev eth0 down", "sudo systemctl isolate rescue.target", "sudo rm -r /x", "sudo kill 5",
        "sudo sysctl -w net.ipv4.ip_forward=0", "sudo modprobe -r cramfs", "sudo userdel x", "sudo chattr -i /x",
        "sudo reboot", "sudo usermod -L x", "sudo nft 'add rule inet t out ip daddr 1.2.3.4 drop'",
    ],
)  # fmt: skip
def test_the_list_of_dangerous_commands(command):
    assert DANGEROUS.search(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_no_name_in_place_of_a_value(command):
    for text in texts(command):
        assert not re.search(r"\{[a-z_]+\}", fill(text)), text
        # no PACKAGE, HOST or PROGRAM that the operator has to replace, and no guessed interface, network or account
        names = set(re.findall(r"(?<![\w$%.-])[A-Z][A-Z_]{2,}(?![\w.=])", fill(text)))
        assert names <= {"STOP", "CONT", "KILL", "LD_PRELOAD", "LD_AUDIT", "POST", "NAME", "SELINUX", "MODEL", "SERIAL",
                         "TRAN", "VENDOR", "GRUB_CMDLINE_LINUX", "MAC", "ALL"}, names  # fmt: skip
        assert not re.search(r"\beth0\b|\bwww-data\b|euid=33|10\.0\.0\.53", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_firewall_rules_create_their_own_table(command):
    """A rule for a table that does not exist is an error, and a rule in another's table outlives its undo."""
    text = command["command"]
    for table in re.findall(r"add (?:rule|chain) inet (\S+)", text):
        assert f"add table inet {table};" in text
        assert f"nft delete table inet {table}" in command["undo"]
    assert len(re.findall("add chain", text)) == len(re.findall(r"type filter hook \w+ priority", text))


def test_the_kernel_accepts_the_firewall_rules_and_their_undo():
    """Adds and deletes each set of rules in a network namespace of its own."""
    namespace = ["unshare", "--map-root-user", "--net"]
    if not (shutil.which("unshare") and shutil.which("nft")):
        pytest.skip("needs unshare and nft")
    if subprocess.run([*namespace, "nft", "list", "ruleset"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to create a network namespace with nftables")
    changes = {}
    for command in (param.values[0] for param in COMMANDS):
        for rules in re.findall(r"nft ('add table .*?')", fill(command["command"])):
            changes[rules] = re.search(r"nft (delete table inet \w+)", fill(command["undo"]))[1]
    assert len(changes) >= 5
    for rules, undo in changes.items():
        script = f'nft {rules} && nft {undo} && test -z "$(nft list ruleset)"'
        result = subprocess.run([*namespace, "sh", "-c", script], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, ""), rules


@pytest.mark.parametrize("command", COMMANDS)
def test_resolver_fragments_are_complete_and_checked(command):
    if "/etc/unbound/" in command["command"]:
        assert "printf 'server:\\n" in command["command"]
        assert "&& sudo unbound-checkconf &&" in command["command"]


@pytest.mark.parametrize("command", COMMANDS)
def test_evidence_is_written_to_the_folder_of_the_finding_only(command):
    text = command["command"]
    assert "/root/evidence" not in text
    assert "evidence" not in command.get("undo", "")
    assert not re.search(r"(?<![0-9])>(?!/dev/null)", re.sub(r"'[^']*'", "", text))  # written with tee instead
    copies = re.findall(r"sudo ((?:cp|mv|install) [^;|&]*)", text)
    for copy in copies:
        folder = copy.startswith("install -d -m 0700 ")
        assert folder or "--backup=numbered" in copy or copy.startswith("mv -n "), copy
    for target in re.findall(r"\btee (?!-a \"\$d\")(\S+)", text):
        assert re.fullmatch(r"/etc/[A-Za-z0-9./{}_-]+", target), target
    if '"$d"' in text:
        start = 'd={evidence}; sudo install -d -m 0700 "$d"; '
        assert text.startswith((start, "sudo kill -STOP {pid}; " + start))


def make(number, **metadata):
    return Finding(number, "Backdoor", "", "suid", "high", 80.0, 80.0, metadata)


def test_the_evidence_folder_differs_between_findings():
    ids = ["ioc1", "ioc2", "a/b", "a-b", "a b", "", "/", "é", "\ud800", "x" * 500, "x" * 501, "$(id)", "../../etc"]
    folders = {evidence_folder(make(name)) for name in ids}
    assert len(folders) == len(ids)
    assert all(re.fullmatch(r"/root/evidence/[A-Za-z0-9-]{1,46}", folder) for folder in folders)


@needs_bash
def test_a_second_copy_keeps_the_first(tmp_path):
    """Runs the command of the table for two findings and again for the first, with ``sudo`` as an empty wrapper."""
    for name in ("one", "two"):
        source = tmp_path / name / "bash"
        source.parent.mkdir()
        source.write_text(name)
        for _ in range(2):
            action = remediate(make(name, path=str(source)), str(tmp_path / "evidence" / name))["actions"][0]
            script = f'sudo() {{ "$@"; }}; {action["command"]}'
            subprocess.run([BASH, "-c", script], check=True, capture_output=True)
    for name in ("one", "two"):
        copies = sorted((tmp_path / "evidence" / name).glob("bash*"))
        assert [copy.name for copy in copies] == ["bash", "bash.~1~"]
        assert {copy.read_text() for copy in copies} == {name}
        assert len((tmp_path / "evidence" / name / "sha256").read_text().splitlines()) == 2


def test_training_targets_have_a_folder_that_the_prompt_determines():
    one, two = make("one", path="/opt/x/bash"), make("two", path="/opt/x/bash")
    assert remediate(one) != remediate(two)
    assert remediate(one, NEW_EVIDENCE_FOLDER) == remediate(two, NEW_EVIDENCE_FOLDER)
    assert NEW_EVIDENCE_FOLDER in str(remediate(one, NEW_EVIDENCE_FOLDER))
    known = commands_of_answers(one)
    learned = remediate(one, NEW_EVIDENCE_FOLDER)["actions"][0]["command"]
    assert known[learned]["command"] == remediate(one)["actions"][0]["command"]
    assert evidence_folder(one) in known[learned]["command"]
    assert known[learned]["needs"] == ["any"]


@pytest.mark.parametrize("name", list(VALUES))
def test_a_value_needs_no_quotes_in_a_shell(name):
    @settings(max_examples=30, deadline=None, database=None)
    @given(st.from_regex(VALUES[name][1], fullmatch=True))
    def check(value):
        assert shlex.quote(value) == value
        assert not value.startswith("-")

    check()
