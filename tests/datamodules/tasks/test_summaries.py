"""The summary task and the triage task."""

import json
import re

import jsonschema
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.records import SEVERITIES, Document
from datamodules.tasks import SummaryTask, TriageTask, build_tasks
from datamodules.tasks.base import round_number
from tests.helpers.tasks_data import make_correlation, make_document, make_finding, prompt_findings


def test_the_exact_text_of_a_summary():
    document = make_document(7, [make_correlation(["f_4", "f_3"])])
    (pair,) = SummaryTask().pairs(document)
    assert json.loads(pair.completion)["executive_summary"] == (
        "7 findings: 1 critical, 1 high, 1 medium, 2 low, 2 info. Top risks: Open port 4 (risk 90); Open port 3 (risk "
        "70); Open port 2 (risk 50). Correlated: Ports belong together (2 findings). Isolate the host and start "
        "incident response today, beginning with Open port 4."
    )
    assert (pair.severity, pair.category, pair.findings) == ("critical", "mixed", 7)


def test_triage_orders_findings_by_risk():
    document = make_document(24, [make_correlation(["f_9", "f_14"])])
    document.findings[9].baseline_status = "new"
    (pair,) = TriageTask().pairs(document)
    answer = json.loads(pair.completion)
    # four are critical at 90; the fifth is the first of those at 70 by id (as text)
    assert [row["id"] for row in answer["top_findings"]] == ["f_14", "f_19", "f_4", "f_9", "f_13"]
    assert answer["top_findings"][3] == {
        "id": "f_9", "title": "Open port 9", "severity": "critical", "risk_score": 90, "probability_actionable": 0.25,
        "reason": "critical severity at risk 90; 25% likely actionable; new since the baseline; "
        "part of: Ports belong together",
    }  # fmt: skip
    assert answer["triage_summary"] == (
        "9 of 24 findings need attention now; 5 can be planned and 10 can wait. "
        "Start with f_14: Open port 14 (risk 90)."
    )
    shown = {line["id"]: line for line in prompt_findings(pair)}
    for row in answer["top_findings"]:
        assert all(shown[row["id"]][key] == row[key] for key in row if key != "reason")


def test_triage_of_harmless_findings():
    document = Document("s", "m", 0, [make_finding(0, "info", 10.0, probability_actionable=None)])
    (pair,) = TriageTask().pairs(document)
    answer = json.loads(pair.completion)
    assert answer["triage_summary"] == "0 of 1 finding needs attention now; 0 can be planned and 1 can wait."
    assert "probability_actionable" not in answer["top_findings"][0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SEVERITIES), st.integers(0, 10_000)), min_size=1, max_size=24))
def test_every_number_of_an_answer_is_in_the_window_or_counted_from_it(rows):
    findings = [make_finding(i, severity, score / 100, title="A thing") for i, (severity, score) in enumerate(rows)]
    document = Document("s", "m", 0, findings)
    counts = {sum(severity == name for severity, _ in rows) for name in SEVERITIES}
    sums = {len(rows), sum(s in ("critical", "high") for s, _ in rows), sum(s in ("low", "info") for s, _ in rows)}
    allowed = {str(n) for n in counts | sums} | {str(round_number(score / 100)) for _, score in rows}
    for name, task in build_tasks(["summary", "triage"]).items():
        (pair,) = task.pairs(document)
        text = json.loads(pair.completion)["executive_summary" if name == "summary" else "triage_summary"]
        text = re.sub(r"f_\d+", "", text)
        assert {token.rstrip(".") for token in re.findall(r"\d[\d.]*", text)} <= allowed


def test_a_documents_own_summaries_are_used_for_the_whole_document_only():
    own = {"executive_summary": " Ten findings. ", "triage_summary": "Start with one.", "analyst": None}
    tasks = build_tasks(["summary", "triage"])
    for count, used in ((24, True), (25, False)):
        document = make_document(count, summaries=own)
        summary = json.loads(next(tasks["summary"].pairs(document)).completion)["executive_summary"]
        triage = json.loads(next(tasks["triage"].pairs(document)).completion)["triage_summary"]
        assert (summary == "Ten findings.") == (triage == "Start with one.") == used
    for broken in ({"executive_summary": None}, {"executive_summary": 5}, {"executive_summary": " "}):
        document = make_document(5, summaries=broken)
        summary = json.loads(next(tasks["summary"].pairs(document)).completion)["executive_summary"]
        assert summary.startswith("5 findings: ")
    long = make_document(5, summaries={"executive_summary": "word " * 900})
    jsonschema.validate(json.loads(next(tasks["summary"].pairs(long)).completion), tasks["summary"].answer_schema)
