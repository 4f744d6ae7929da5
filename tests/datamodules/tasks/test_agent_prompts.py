"""The agent's prompts as tasks. ``make test-agent`` compares the prompts with those that the agent sends."""

import json

import jsonschema
import pytest

from datamodules.records import Document
from datamodules.tasks import build_tasks
from datamodules.tasks.agent_prompts import (
    AGENT_TASKS,
    MAX_PROMPT,
    RULES,
    AgentChatRules,
    AgentChatSummary,
    AgentChatTriage,
    AgentLocalSummary,
    refined,
    steps,
    summary,
    unlisted_members,
)
from datamodules.tasks.agent_reductions import agent_findings, reductions, rule_suggestions
from tests.helpers.tasks_data import ATTACK, make_correlation, make_document, make_finding

PORTS = [make_finding(1, "high", 70.0, metadata={"state": "LISTEN", "port": "22"}), make_finding(2, "critical", 90.0)]
LINK = make_correlation(["f_1", "f_2", "f_9"])


def test_the_local_prompt_is_pythons_notation():
    content = AgentLocalSummary().content(
        PORTS[:1], [LINK], [{"priority": 1, "action": "Look", "correlation_refs": ["c"]}]
    )
    findings, correlations, actions, end = content.split("\n")
    assert findings.startswith("Findings: module_summary={} suid_summary={} network_summary={'listen_count': 1, ")
    assert "'top_listen_ports': [('22', 1)]" in findings
    assert "top_findings=[{'id': 'f_1', 'title': 'Open port 1', 'severity': 'high', 'risk_score': 70, " in findings
    assert correlations == (
        "Correlations: [Correlation(id='c', title='Ports belong together', rationale='They listen, they listen, they "
        "listen', related_finding_ids=['f_1', 'f_2', 'f_9'], risk_score_delta=0, tags=['correlation'], "
        "severity='high', predicate_hits=None)]"
    )
    assert actions == "Actions: [ActionItem(priority=1, action='Look', correlation_refs=['c'])]"
    assert end == ""


def test_the_chat_prompts_are_json_with_spaces():
    content = AgentChatSummary().content(PORTS, [LINK])
    assert content.startswith('{"reductions": {"module_summary": {}, "suid_summary": {}, "network_summary": ')
    value = json.loads(content)
    assert list(value) == ["reductions", "correlations", "actions", "baseline_context_present"]
    keys = ["id", "title", "severity", "rationale", "related_finding_ids", "tags"]
    assert list(value["correlations"][0]) == keys
    assert (value["actions"], value["baseline_context_present"]) == ([], False)
    value = json.loads(AgentChatTriage().content(PORTS, [LINK]))
    assert value["correlations"] == [{"id": "c", "title": "Ports belong together", "severity": "high"}]
    value = json.loads(AgentChatRules().content(make_document(60).findings, examples={"gap": ["a"]}))
    assert [rule["id"] for rule in value["suggestions"]] == ["gap_open_port"]
    assert value["examples"] == {"gap": ["a"]}


def test_answers_state_only_values_of_the_prompt():
    reduced = reductions(agent_findings(PORTS))
    assert summary(reduced, [LINK]) == (
        "Riskiest findings: 1 critical, 1 high. Top risks: Open port 2 (risk 90); Open port 1 (risk 70). Listening "
        "sockets: 1. Correlated: Ports belong together (3 findings). Isolate the host and start incident response with "
        "Open port 2."
    )
    assert steps(reduced) == (
        "1. Contain and investigate now: Open port 2 (f_2)\n2. Investigate within a day: Open port 1 (f_1)"
    )
    assert unlisted_members(reduced, [LINK]) == ["1 of 3 findings of correlation c are not listed."]
    answer = json.loads(AgentChatSummary().answer(PORTS, [LINK]))
    assert answer["analyst"] == {"correlation_count": 1, "top_findings_count": 2}
    assert answer["consistency_findings"] == [{"issue": "1 of 3 findings of correlation c are not listed."}]
    triage = {"id": "f_2", "title": "Open port 2", "severity": "critical", "risk_score": 90}
    assert answer["triage_summary"]["top_findings"][0] == triage
    assert json.loads(AgentChatTriage().answer(PORTS, [])) == answer["triage_summary"] | {"correlation_count": 0}


def test_counts_of_suid_files_and_modules_are_sentences():
    findings = [
        make_finding(0, "medium", 50.0, title="SUID", metadata={"suid": "true", "path": "/tmp/sh"}),
        make_finding(1, "low", 30.0, title="Module", metadata={"module": "bridge"}),
    ]
    text = AgentLocalSummary().answer(findings)
    assert "Unexpected SUID files: 1, such as /tmp/sh." in text
    assert "Notable kernel modules: bridge." in text
    assert text.endswith("Plan a fix for the next maintenance window, beginning with SUID.")
    assert AgentLocalSummary().answer([make_finding(0, "info", 5.0)]) == (
        "The report has no finding above severity info."
    )


def test_the_worst_finding_is_named_even_if_another_has_a_higher_score():
    findings = [make_finding(1, "low", 99.0), make_finding(2, "critical", 80.0)]
    assert AgentLocalSummary().answer(findings).endswith("start incident response with Open port 2.")


def test_a_refined_rule_keeps_its_id_and_states_its_conditions():
    findings = agent_findings([make_finding(n, "high", 70.0, title="Odd binary", metadata={"k": "v"}) for n in (1, 2)])
    (rule,) = rule_suggestions(findings)
    assert refined(rule) == rule | {
        "conditions": [{"metadata_key": "k", "metadata_contains": "v"}],
        "rationale": rule["rationale"] + "; matches if k contains 'v'.",
        "tags": ["auto_suggested", "gap_candidate", "refined"],
    }
    generic = {"conditions": [{"field": "title", "contains": "binary"}], "rationale": "r", "tags": []}
    assert refined(generic)["conditions"] == generic["conditions"]  # a rule without conditions matches all


def test_pairs_are_windows_and_the_whole_document():
    document = make_document(60, [make_correlation([f"f_{n}" for n in range(60)])])
    for task in build_tasks(["agent_local_summary", "agent_chat_triage"]).values():
        pairs = list(task.pairs(document))
        assert pairs[-1].content == task.content(document.findings)
        assert pairs[-1].findings == 60
        linked = ["Ports belong together" in pair.content for pair in pairs]
        assert linked == [False, True, False, True, False][: len(linked)]
        assert pairs[-1].severity == "critical"


def test_a_correlation_in_a_window_refers_to_its_findings():
    document = make_document(60, [make_correlation([f"f_{n}" for n in range(60)])])
    for pair in build_tasks(["agent_chat_summary"])["agent_chat_summary"].pairs(document):
        for link in json.loads(pair.content)["correlations"]:
            assert 2 <= len(link["related_finding_ids"]) <= pair.findings


def test_a_rule_task_has_no_pair_without_a_repeated_title():
    findings = [make_finding(n, "high", 70.0, title=f"{chr(97 + n) * 5} thing") for n in range(5)]
    assert list(AgentChatRules().pairs(Document("s", "m", 0, findings))) == []


@pytest.mark.parametrize("name", AGENT_TASKS)
def test_prompts_are_bounded_and_skipped_ones_are_counted(name):
    findings = [make_finding(n, "high", 70.0, title="long " + "x" * MAX_PROMPT) for n in range(3)]
    task = build_tasks([name])[name]
    assert list(task.pairs(Document("s", "m", 0, findings))) == []
    assert task.skipped == {f"{name}_too_long": 1}


def test_hostile_text_stays_inside_its_string():
    findings = [
        make_finding(n, "high", 70.0, title=ATTACK + "\ud800", metadata={"suid": "true", "path": ATTACK})
        for n in (1, 2)
    ]
    for task in build_tasks(AGENT_TASKS).values():
        content = task.content(findings, [make_correlation(["f_1", "f_2"], description=ATTACK)])
        content.encode()
        assert "\n\nIgnore" not in content
        if task.name != "agent_local_summary":
            json.loads(content)
        answer = task.answer(findings)
        jsonschema.validate(
            answer if task.answer_schema["type"] == "string" else json.loads(answer), task.answer_schema
        )
    assert RULES["maxItems"] == 12
