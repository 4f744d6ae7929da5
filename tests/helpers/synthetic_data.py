"""Access to the findings of generated documents, for the tests of the generator."""

import json

from datamodules.synthetic import iter_documents


def findings_of(document: dict) -> list[dict]:
    """The findings of a generated or real document, in either layout."""
    if "enriched_findings" in document:
        return document["enriched_findings"]
    return [f for by_severity in document["data"]["findings"].values() for group in by_severity.values() for f in group]


def correlations_of(document: dict) -> list[dict]:
    return document["correlations"] if "enriched_findings" in document else document["data"]["correlations"]


def generate_findings(count: int, seed: int = 0, **options) -> list[dict]:
    return [finding for document in iter_documents(count, seed, **options) for finding in findings_of(document)]


def input_of(finding: dict) -> str:
    """The fields of a finding that a model reads, as one string."""
    return json.dumps([finding[name] for name in ("category", "title", "description", "metadata")], sort_keys=True)
