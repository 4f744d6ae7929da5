import json
import re

import pytest

from datamodules.errors import UserError
from datamodules.records import Document
from datamodules.tasks import build_tasks
from tests.helpers.tasks_data import TEMPLATE, make_correlation, make_document, make_finding


def test_a_template_is_split_into_instruction_and_content(tasks):
    task = tasks["agent_summarize"]
    assert task.instruction == "Look at this scan.\n\nData:\n"
    document = make_document(3)
    (pair,) = task.pairs(document)
    assert pair.content.startswith('{"findings":[{"id":"f_0",')
    assert "\n\nMore {braces} here:\n{" in pair.content
    assert pair.content.endswith("risk_assessment, recommendations.")
    answer = json.loads(pair.completion)
    assert list(answer) == ["executive_summary", "key_findings", "risk_assessment", "recommendations"]
    assert answer["risk_assessment"] == "Medium: 1 medium, 1 low, 1 info; highest risk score 50."
    assert answer["key_findings"][0] == "f_2: Open port 2 (medium, risk 50)"


def test_data_that_looks_like_a_variable_is_not_filled(tasks):
    document = Document("s", "m", 0, [make_finding(0, title="{context}{scan_data}")])
    (pair,) = tasks["agent_summarize"].pairs(document)
    assert pair.content.count('"finding_count":1') == 1
    assert json.loads(pair.content.split("\n")[0])["findings"][0]["title"] == "{context}{scan_data}"


def test_answers_use_the_summary_and_the_actions_of_the_whole_document(tasks):
    own = {"executive_summary": "Ten findings."}
    actions = [{"id": "a", "title": "Look", "description": "Look at it now."}, {"title": 5}, {"description": "Wait."}]
    document = make_document(24, summaries=own)
    document.actions = actions
    answer = json.loads(next(tasks["agent_summarize"].pairs(document)).completion)
    assert answer["executive_summary"] == "Ten findings."
    assert answer["recommendations"] == ["Look: Look at it now.", "Wait."]
    document.findings.append(make_finding(24))  # two windows: the texts are about neither of them
    answer = json.loads(next(tasks["agent_summarize"].pairs(document)).completion)
    assert "Ten findings." not in answer["executive_summary"]
    assert "Wait." not in answer["recommendations"]


def test_the_agents_own_templates(shared_data):
    folder = shared_data / "agent_prompt_templates"
    tasks = build_tasks(["agent_summarize", "agent_triage"], agent_templates=str(folder))
    document = make_document(30, [make_correlation(["f_0", "f_2"])])
    for name, task in tasks.items():
        template = json.loads(next(folder.glob(name.removeprefix("agent_") + "_v*.json")).read_text())["template"]
        pair = next(task.pairs(document))
        # instruction + content is the agent's prompt with its variables filled
        pieces = re.split(r"\{\w+\}", template)
        rest = task.instruction + pair.content
        for piece in pieces:
            assert piece in rest
            rest = rest[rest.index(piece) + len(piece) :]
    answer = json.loads(next(tasks["agent_triage"].pairs(document)).completion)
    assert list(answer) == ["top_findings", "correlation_count", "security_posture", "response_actions"]
    assert answer["correlation_count"] == 1
    with pytest.raises(UserError, match="rule_suggestions"):
        build_tasks(["agent_refine_rules"], agent_templates=str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variables": ["scan_data", "secret"]}, "'secret' is not supported"),
        ({"variables": ["scan_data", "correlations"]}, "'correlations' is declared but not"),
        ({"variables": []}, "declares no 'variables'"),
        ({"template": "{scan_data}\n{context}\nkeys: executive_summary."}, "no line break before"),
        ({"template": "A\n{scan_data}\n{context}\nAnswer well"}, "does not end with the keys"),
        ({"template": "A\n{scan_data}\n{context}\nkeys: poem, executive_summary."}, "asks for the key 'poem'"),
        ({"template": 5}, "has no text 'template'"),
    ],
)
def test_unusable_templates(tmp_path, change, message):
    (tmp_path / "mine_v1.json").write_text(json.dumps(TEMPLATE | change))
    with pytest.raises(UserError, match=re.escape(message)):
        build_tasks(["agent_mine"], agent_templates=str(tmp_path))


def test_unusable_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        build_tasks(["risk"], agent_templates=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no \*\.json file"):
        build_tasks(["risk"], agent_templates=str(tmp_path))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        build_tasks(["risk"], agent_templates=str(tmp_path))
