"""Documents of ``analyze`` without a model on disk: a script answers, or every value is computed by rule."""

import json

from commands.analyze.assessment.evidence import host_of, scanner_failures, skipped_findings
from commands.analyze.pipeline import Analysis
from datamodules.sources.scanner_report import read_report
from datamodules.tasks import TASKS
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
