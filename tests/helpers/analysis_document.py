"""Documents of ``analyze`` without a model on disk (a script answers, or rules do), and checks of any document."""

import json

from jsonschema import Draft202012Validator

from commands.analyze.assessment.evidence import host_of, scanner_failures, skipped_findings
from commands.analyze.pipeline import Analysis
from datamodules.sources.scanner_report import read_report
from datamodules.tasks import TASKS, schemas
from datamodules.tasks.base import compact_json
from lightning_modules.generation.response_cache import Response
from tests.helpers.trained_run import REPORT


def report_with(**changes):
    """Returns the test report; ``changes`` are merged into its second finding, which is the most severe one."""
    report = json.loads(json.dumps(REPORT))
    report["results"][0]["findings"][1] |= changes
    return report


def analysis_document(report, unusable=({"position": 4},), answers=None, limit=None, **options):
    """Returns the document that ``analyze`` writes for a report.

    Args:
        report: content of the report.
        unusable: records of the report that could not be read.
        answers: an answer for each task: an object, or a function of the content; no answer is valid without it.
        limit: value of ``--limit``.
        **options: arguments of :class:`Analysis`, such as ``trust``.
    """
    parsed = read_report(report)
    reference = {"file": "report.json", "sha256": "0" * 64, "unusable": list(unusable), "host": host_of(report)}
    reference |= scanner_failures(report)
    if limit is not None and limit < len(parsed.document.findings):
        reference |= {"limit": limit, "skipped": skipped_findings(parsed.document.findings[limit:])}
        parsed.document.findings[limit:] = []

    def generate(questions, progress):
        return [Response(_text((answers or {}).get(task.name), content), True) for task, content in questions]

    document = Analysis(generate, TASKS, **options)(parsed.document, reference)
    document["enrichment_results"]["model_report"] |= {"model": "tiny", "tasks": list(TASKS), "constrained": True}
    document["raw_reference"] = reference
    return document


def _text(answer, content):
    answer = answer(json.loads(content)) if callable(answer) else answer
    return "" if answer is None else compact_json(answer)


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
