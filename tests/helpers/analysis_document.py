"""Documents of ``analyze`` without a model: every value is computed by rule."""

import json

from commands.analyze.pipeline import Analysis
from datamodules.sources.scanner_report import read_report
from datamodules.tasks import TASKS
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
