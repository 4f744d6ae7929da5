import json
from dataclasses import replace

import jsonschema
import pytest

from datamodules.records import Document, Finding
from datamodules.tasks import RiskTask
from tests.helpers.tasks_data import make_finding, read_documents


def test_the_exact_text_of_a_pair():
    finding = make_finding(7, "high", 70.0)
    (pair,) = RiskTask().pairs(Document("s", "m", 0, [finding]))
    assert pair.content == (
        '{"title":"Open port 7","description":"A port is open","category":"network","metadata":{"port":7}}'
    )
    assert pair.completion == (
        '{"tags":["a"],"severity":"high","risk_score":70,"risk_subscores":{"impact":0.12,"exposure":1.0,'
        '"anomaly":0.0,"confidence":0.5},"probability_actionable":0.25}'
    )
    assert (pair.task, pair.severity, pair.category, pair.findings) == ("risk", "high", "network", 1)


def test_the_prompt_does_not_contain_the_answer():
    finding = make_finding(7)
    other = replace(
        finding, id="z", severity="critical", risk_score=98.76, base_severity_score=91, tags=["leak"],
        risk_subscores={}, probability_actionable=0.99, baseline_status="new", rationale=["leak"],
        correlation_refs=["leak"], enrichment={"mitigation_steps": ["leak"]},
    )  # fmt: skip
    assert RiskTask().content(finding) == RiskTask().content(other)


def test_parts_that_the_document_lacks_are_left_out():
    task = RiskTask()
    bare = Finding("x", "t", "", "dns", "low", 33.336, 30.0)
    (pair,) = task.pairs(Document("s", "m", 0, [bare]))
    assert pair.completion == '{"tags":[],"severity":"low","risk_score":33.34}'
    partial = replace(bare, risk_subscores={"confidence": 0.5, "impact": 0.1}, risk_score=0.0)
    (pair,) = task.pairs(Document("s", "m", 0, [partial]))
    assert '"risk_score":0,"risk_subscores":{"impact":0.1,"confidence":0.5}' in pair.completion
    jsonschema.validate(json.loads(pair.completion), task.answer_schema)


def test_a_rationale_is_trained_on_request():
    reasons = ["It listens on every address.", "x" * 300]
    finding = make_finding(1, "high", rationale=reasons)
    (plain,) = RiskTask().pairs(Document("s", "m", 0, [finding]))
    assert "rationale" not in plain.completion + RiskTask().instruction
    task = RiskTask(rationale=True)
    (pair,) = task.pairs(Document("s", "m", 0, [finding]))
    assert "tags (list of strings), rationale (the reasons in one or two sentences), severity" in task.instruction
    answer = json.loads(pair.completion)
    assert list(answer)[:3] == ["tags", "rationale", "severity"]
    assert answer["rationale"].startswith("It listens on every address. xxx")
    assert len(answer["rationale"]) == 240
    assert {key: value for key, value in answer.items() if key != "rationale"} == json.loads(plain.completion)
    assert pair.content == plain.content
    jsonschema.validate(answer, task.answer_schema)
    (bare,) = task.pairs(Document("s", "m", 0, [make_finding(1)]))
    assert "rationale" not in bare.completion
    jsonschema.validate(json.loads(bare.completion), task.answer_schema)
    assert RiskTask().answer_schema is RiskTask.answer_schema


def test_a_real_finding_with_its_answer_is_an_enriched_finding_of_the_published_schema(shared_data):
    schema = json.loads((shared_data / "ground_truth_schema.json").read_text())
    items = jsonschema.Draft202012Validator(schema["properties"]["enriched_findings"]["items"])
    document = next(read_documents(shared_data / "plain_batch.json"))
    for finding, pair in zip(document.findings, RiskTask().pairs(document), strict=True):
        record = json.loads(pair.content) | json.loads(pair.completion)
        items.validate(record | {"id": "x", "base_severity_score": 10, "baseline_status": finding.baseline_status})


@pytest.mark.parametrize(
    "wrong",
    [
        {"severity": "urgent", "risk_score": 1},
        {"severity": "low"},
        {"severity": "low", "risk_score": 101},
        {"severity": "low", "risk_score": "1"},
        {"severity": "low", "risk_score": 1, "more": 1},
        {"severity": "low", "risk_score": 1, "probability_actionable": 1.1},
        {"severity": "low", "risk_score": 1, "risk_subscores": {"impact": 2}},
        {"severity": "low", "risk_score": 1, "tags": "a"},
    ],
)
def test_the_schema_rejects_wrong_answers(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RiskTask().answer_schema)
