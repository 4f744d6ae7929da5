"""Documents of ``analyze`` without a model (every value is computed by rule), and checks of any document."""

import json

from jsonschema import Draft202012Validator

from commands.analyze.pipeline import Analysis
from datamodules.sources.scanner_report import read_report
from datamodules.tasks import TASKS, schemas
from lightning_modules.generation.response_cache import Response
from tests.helpers.trained_run import REPORT


def report_with(**changes):
    """Returns the test report; ``changes`` are merged into its second finding, which is the most severe one."""
    report = json.loads(json.dumps(REPORT))
    report["results"][0]["findings"][1] |= changes
    return report


def analysis_document(report):
    """Returns the document that ``analyze`` writes for a report if no answer of the model is valid."""
    parsed = read_report(report)
    document = Analysis(lambda questions, progress: [Response("", True) for _ in questions], TASKS)(parsed.document)
    results = document["enrichment_results"]
    results["model_report"] = {
        "model": "tiny", "tasks": list(TASKS), "constrained": True, "answers": results["model_report"],
    }  # fmt: skip
    document["raw_reference"] = {"file": "report.json", "sha256": "0" * 64, "unusable": [{"position": 4}]}
    return document


def check_document(document, ground_truth_schema=None):
    """Validates a document against the schemas of the project, and its references against its ids."""
    if ground_truth_schema is not None:
        Draft202012Validator(ground_truth_schema).validate(document)
    ids = [finding["id"] for finding in document["enriched_findings"]]
    assert len(set(ids)) == len(ids)
    risk = Draft202012Validator({**schemas.RISK, "required": list(schemas.RISK["properties"])})
    for finding in document["enriched_findings"]:
        risk.validate({name: finding[name] for name in schemas.RISK["properties"]})
        assert isinstance(finding["risk_score"], int)
    correlation = Draft202012Validator(schemas.correlation(8))
    known = set(schemas.correlation(8)["properties"])
    for item in document["correlations"]:
        correlation.validate({name: value for name, value in item.items() if name in known})
        assert set(item["related_finding_ids"]) <= set(ids)
    assert {row["id"] for row in document["reductions"]["top_findings"]} <= set(ids)
    for action in document["actions"]:
        assert set(action["finding_ids"]) <= set(ids)
    assert document["summaries"]["executive_summary"]
    assert document["summaries"]["triage_summary"]
