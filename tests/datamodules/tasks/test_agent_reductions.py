"""The agent's reductions, against values worked out by hand. ``make test-agent`` compares them with the agent's."""

from datamodules.tasks.agent_reductions import (
    AgentFinding,
    agent_findings,
    agent_tags,
    redact,
    redacted_reductions,
    reductions,
    rule_suggestions,
)
from tests.helpers.tasks_data import make_finding


def seen(index=0, severity="high", risk=70, title="Port", correlated=False, tags=(), **metadata) -> AgentFinding:
    return AgentFinding(f"f{index}", title, severity, risk, metadata, list(tags), correlated)


def test_findings_of_severity_info_are_dropped_and_scores_are_rounded():
    findings = [make_finding(0, "info", 10.0), make_finding(1, "high", 70.4), make_finding(2, "low", 29.6)]
    assert [(one.id, one.risk_score) for one in agent_findings(findings)] == [("f_1", 70), ("f_2", 30)]
    assert not any(one.correlated for one in agent_findings(findings))
    linked = make_finding(3, correlation_refs=["c"])
    assert agent_findings([linked])[0].correlated


def test_tags_follow_from_severity_title_and_a_digest():
    # md5("f_1:SUID file:critical") = 2 modulo 100; computed with md5sum and bc
    import hashlib

    share = int(hashlib.md5(b"f_1:SUID file:critical").hexdigest(), 16) % 100
    status = "new" if share < 30 else "existing" if share < 90 else "unknown"
    finding = make_finding(1, "critical", title="SUID file", tags=["own"], baseline_status="new")
    assert agent_tags(finding) == ["high_priority", "suid", "privilege_escalation", "filesystem", f"baseline:{status}"]
    assert agent_tags(make_finding(1, title="Open PORT of a process"))[:-1] == ["network", "process"]
    statuses = {agent_tags(make_finding(index))[-1] for index in range(60)}
    assert statuses == {"baseline:new", "baseline:existing", "baseline:unknown"}


def test_reductions_of_an_empty_report():
    network = {"listen_count": 0, "top_listen_ports": [], "known_org_count": []}
    empty = {"module_summary": {}, "suid_summary": {}, "network_summary": network, "top_findings": [], "top_risks": []}
    assert reductions([]) == empty


def test_modules_suid_files_and_ports_are_counted():
    findings = [
        seen(0, module="bridge", module_family="net"), seen(1, module="rare"), seen(2, module="twice"),
        seen(3, module="twice"), seen(4, module=["list"]), seen(5, module=""),
        seen(6, suid="true", path="/x"), seen(7, suid="true", path="/y", expected="true"), seen(8, suid="false"),
        seen(9, state="LISTEN", port=22), seen(10, state="LISTEN", port=22), seen(11, state="LISTEN"),
        seen(12, state="ESTABLISHED", port=9, remote_org="Org"),
        seen(13, tags=["known_good"], remote_org="Org"),
    ]  # fmt: skip
    reduced = reductions(findings)
    assert reduced["module_summary"] == {
        "module_count": 4, "distinct_modules": 3, "notable_modules": ["bridge"], "uncommon_modules": ["rare"],
        "module_family_counts": [("net", 1)], "avg_rarity_score": 0.0, "top_rare_modules": [],
    }  # fmt: skip
    assert reduced["suid_summary"] == {"suid_total": 2, "unexpected_suid": ["/x"]}
    assert reduced["network_summary"] == {
        "listen_count": 3, "top_listen_ports": [(22, 2)], "known_org_count": [("Org", 1)],
    }  # fmt: skip


def test_the_ten_riskiest_findings_are_listed_in_the_order_of_the_report_if_tied():
    reduced = reductions([seen(index, risk=50 + (index == 11)) for index in range(12)])
    assert [row["id"] for row in reduced["top_findings"]] == ["f11", *(f"f{index}" for index in range(9))]
    assert reduced["top_risks"] == reduced["top_findings"]
    assert list(reduced["top_findings"][0]) == ["id", "title", "severity", "risk_score", "tags"]


def test_user_names_are_redacted_in_the_title_and_everywhere_for_the_chat_provider():
    assert redact("/home/al.ice/x /Users/bob /root") == "/home/<user>/x /Users/<user> /root"
    assert redact({"/home/a": ["/home/a", ("/home/a",), 5]}) == {"/home/a": ["/home/<user>", ("/home/a",), 5]}
    finding = AgentFinding(
        "/home/a/f", "at /home/a", "low", 1, {"suid": "true", "path": "/home/a/s"}, ["/home/a"], False
    )
    local = reductions([finding])
    assert (local["top_findings"][0]["id"], local["top_findings"][0]["title"]) == ("/home/a/f", "at /home/<user>")
    assert local["suid_summary"]["unexpected_suid"] == ["/home/a/s"]
    chat = redacted_reductions(local)
    assert chat["top_findings"][0]["id"] == "/home/<user>/f"
    assert chat["top_findings"][0]["tags"] == ["/home/a"]  # lists of a finding are not redacted
    assert chat["suid_summary"]["unexpected_suid"] == ["/home/<user>/s"]
    assert list(chat) == list(local)


def test_a_rule_is_suggested_for_a_repeated_title():
    findings = [seen(n, title=f"Odd Binary {n} found", rule="x", pid=n, arguments=["a"]) for n in range(6)]
    findings.insert(0, seen(9, title="Listening port", severity="low", risk=10))
    findings.append(seen(10, title="Listening port 5", severity="low", risk=9))  # too small a risk
    (rule,) = rule_suggestions(findings)
    assert rule == {
        "id": "gap_odd_binary_found", "title": "Auto Suggested: Binary Found",
        "rationale": "Suggested from 6 recurring uncorrrelated high-risk findings",
        "conditions": [
            {"field": "title", "contains": "binary"}, {"field": "title", "contains": "found"},
            {"metadata_key": "rule", "metadata_contains": "x"},
        ],
        "logic": "all", "risk_score_delta": 5, "tags": ["auto_suggested", "gap_candidate"],
    }  # fmt: skip


def test_rules_are_ordered_by_frequency_and_leave_out_correlated_findings():
    twice, thrice = [seen(title="aaaa bbbb")] * 2, [seen(title="cccc dddd")] * 3
    assert [rule["id"] for rule in rule_suggestions([*twice, *thrice])] == ["gap_cccc_dddd", "gap_aaaa_bbbb"]
    assert rule_suggestions([seen(title="aaaa", correlated=True)] * 3) == []
    (untitled,) = rule_suggestions([seen(title="12 34")] * 2)
    assert (untitled["id"], untitled["title"]) == ("gap_untitled", "Auto Suggested: Untitled")
