"""The agent's document. ``make test-agent`` validates it with the agent's own model."""

import json

from commands.analyze.agent_format import PRIORITY_NUMBERS, to_agent
from commands.analyze.command import WRITERS
from datamodules.tasks.schemas import PRIORITIES
from tests.helpers.analysis_document import analysis_document, report_with
from tests.helpers.trained_run import REPORT


def by_id(document):
    return {finding["id"]: finding for finding in document["enriched_findings"]}


def test_findings_have_whole_scores_and_lists_of_reasons():
    analysis = analysis_document(REPORT)
    analysis["enriched_findings"][0]["rationale"] = "It listens."
    document = to_agent(analysis)
    assert [one["id"] for one in document["enriched_findings"]] == [one["id"] for one in analysis["enriched_findings"]]
    for finding, source in zip(document["enriched_findings"], analysis["enriched_findings"], strict=True):
        assert isinstance(finding["risk_score"], int)
        assert finding["risk_total"] == finding["risk_score"] == source["risk_score"]
        assert isinstance(finding["rationale"], list)
        assert (finding["severity"], finding["severity_source"]) == (source["severity"], "raw")
    assert document["enriched_findings"][0]["rationale"] == ["It listens."]
    assert document["raw_reference"] == "0" * 64
    assert document["enrichment_results"]["model_report"]["model"] == "tiny"


def test_a_finding_that_the_model_lowers_keeps_the_scanners_severity_and_score():
    analysis = analysis_document(REPORT)
    worst = next(one for one in analysis["enriched_findings"] if one["id"] == "ioc2")
    worst |= {"severity": "low", "risk_score": 20, "severity_source": "model", "risk_total": 20}
    worst.pop("model_severity", None)  # an analysis whose severity is the model's
    finding = by_id(to_agent(analysis))["ioc2"]
    assert (finding["severity"], finding["risk_score"], finding["risk_total"]) == ("critical", 90, 90)
    assert finding["severity_source"] == "raw"
    assert finding["rationale"][0] == "The scanner rates this critical, the model low; critical is used."


def test_a_finding_that_the_model_raises_has_the_models_values():
    analysis = analysis_document(REPORT)
    first = analysis["enriched_findings"][0]
    first |= {"severity": "critical", "scanner_severity": "low", "risk_score": 95, "severity_source": "model"}
    first.pop("model_severity", None)
    finding = by_id(to_agent(analysis))[first["id"]]
    assert (finding["severity"], finding["risk_score"], finding["severity_source"]) == ("critical", 95, "model")


def test_the_severity_that_the_analysis_ranks_by_is_kept():
    analysis = analysis_document(REPORT)
    first = analysis["enriched_findings"][0]
    first |= {"severity": "low", "scanner_severity": "high", "model_severity": "low", "risk_score": 20}
    first |= {"severity_source": "model"}
    finding = by_id(to_agent(analysis))[first["id"]]
    assert (finding["severity"], finding["risk_score"], finding["severity_source"]) == ("low", 20, "model")
    assert finding["rationale"][0] == "The scanner rates this high, the model low; low is used."
    first |= {"model_severity": None, "severity_source": "rule", "severity": "high"}
    finding = by_id(to_agent(analysis))[first["id"]]
    assert (finding["severity"], finding["severity_source"], finding["rationale"]) == ("high", "raw", [])


def test_a_line_of_an_action_has_its_command_needs_danger_and_undo():
    analysis = analysis_document(REPORT)
    analysis["actions"] = [analysis["actions"][0] | {
        "title": "Stop it", "description": "", "command": "kill 1", "needs": ["debian", "sudo"], "danger": "Locks out.",
        "undo": "start 1",
    }]  # fmt: skip
    (action,) = to_agent(analysis)["actions"]
    line = "Stop it - Command: kill 1 - Needs: debian, sudo - Danger: Locks out. - Undo: start 1"
    assert action["action"] == line
    assert to_agent(analysis)["summaries"]["action_narrative"] == f"1. {line}"


def test_the_summaries_have_the_agents_types():
    analysis = analysis_document(REPORT)
    summaries = to_agent(analysis)["summaries"]
    assert summaries["executive_summary"] == analysis["summaries"]["executive_summary"]
    assert summaries["triage_summary"]["text"] == analysis["summaries"]["triage_summary"]
    assert summaries["triage_summary"]["top_findings"] == analysis["reductions"]["top_findings"]
    assert summaries["action_narrative"].startswith("1. ")


def test_actions_are_lines_with_numbers_and_the_correlations_of_their_findings():
    analysis = analysis_document(REPORT)
    assert set(PRIORITY_NUMBERS) == set(PRIORITIES.values())
    document = to_agent(analysis)
    actions = document["actions"]
    assert len(actions) == len(analysis["actions"]) > 0
    assert [one["priority"] for one in actions] == sorted((one["priority"] for one in actions), reverse=True)
    source = max(analysis["actions"], key=lambda one: PRIORITY_NUMBERS[one["priority"]])
    first = actions[0]
    assert first["action"].startswith(source["title"])
    assert ("Command: " in first["action"]) == ("command" in source)
    members = {one["id"]: set(one["related_finding_ids"]) for one in analysis["correlations"]}
    assert first["correlation_refs"] == [key for key, ids in members.items() if ids & set(source["finding_ids"])]


def test_top_findings_have_the_tags_of_the_analysis():
    document = to_agent(analysis_document(report_with(title="At /home/bob/x")))
    top = document["reductions"]["top_findings"]
    assert top == document["reductions"]["top_risks"]
    assert top[0]["title"] == "At /home/<user>/x"
    assert top[0]["tags"] == by_id(document)[top[0]["id"]]["tags"]


def test_the_writer_writes_json():
    text = WRITERS["agent"](analysis_document(REPORT))
    assert json.loads(text)["version"] == "1.0"
