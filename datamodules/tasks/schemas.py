"""JSON Schemas of the answers, strict enough for constrained decoding and consistent with ``ground_truth_v1``.

No object allows additional properties, and all strings and arrays are bounded, so that constrained decoding always
terminates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.records import SEVERITIES, SUBSCORES

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

    from datamodules.tasks.base import Schema

MAX_TAGS = 16
MAX_TAG = 64
MAX_TITLE = 160
MAX_ID = 48  #: characters of the longest id that a prompt shows unchanged; the longest id of the real shards has 43
MAX_RATIONALE = 240
MAX_SUMMARY = 1200
MAX_TOP = 5  #: findings in a triage answer
MAX_LINES = 5  #: items of a list in an agent's answer
MAX_COMMAND = 640  #: a command with its placeholders filled; commands are never truncated
MAX_STEPS = 6  #: remediation actions of an answer
MAX_NEED = 24  #: a distribution family or a tool that a command needs
MAX_NEEDS = 4
MAX_STEP_LENGTH = 240

#: severity of a finding -> priority of its remediation
PRIORITIES = {"info": "none", "low": "low", "medium": "medium", "high": "high", "critical": "immediate"}


def text(length: int) -> Schema:
    """Returns the schema of a string of at most ``length`` characters."""
    return {"type": "string", "maxLength": length}


def number(low: float, high: float) -> Schema:
    """Returns the schema of a number from ``low`` to ``high``, both included."""
    return {"type": "number", "minimum": low, "maximum": high}


def array(items: Schema, most: int) -> Schema:
    """Returns the schema of an array of at most ``most`` items."""
    return {"type": "array", "items": items, "maxItems": most}


def closed(properties: dict[str, Schema], required: list[str] | None = None) -> Schema:
    """Returns the schema of an object without other keys; all keys are required if ``required`` is None."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


SEVERITY: Schema = {"type": "string", "enum": list(SEVERITIES)}
RISK_SCORE: Schema = number(0, 100)
SHARE: Schema = number(0, 1)

#: A document may lack subscores or probabilities, and its answers lack them too: only severity and score are required.
RISK: Schema = closed(
    {
        "tags": array(text(MAX_TAG), MAX_TAGS),
        "severity": SEVERITY,
        "risk_score": RISK_SCORE,
        "risk_subscores": closed(dict.fromkeys(SUBSCORES, SHARE), required=[]),
        "probability_actionable": SHARE,
    },
    required=["severity", "risk_score"],
)

#: The rationale is written before the severity, as in the answers of the risk task with a rationale.
RISK_WITH_RATIONALE: Schema = closed(
    {"tags": RISK["properties"]["tags"], "rationale": text(MAX_RATIONALE)} | RISK["properties"],
    required=["severity", "risk_score"],
)

TOP_FINDING: Schema = closed(
    {
        "id": text(MAX_ID),
        "title": text(MAX_TITLE),
        "severity": SEVERITY,
        "risk_score": RISK_SCORE,
        "probability_actionable": SHARE,
        "reason": text(MAX_RATIONALE),
    },
    required=["id", "title", "severity", "risk_score", "reason"],
)

SUMMARY: Schema = closed({"executive_summary": text(MAX_SUMMARY)})
TRIAGE: Schema = closed({"triage_summary": text(MAX_SUMMARY), "top_findings": array(TOP_FINDING, MAX_TOP)})

REMEDIATION: Schema = closed(
    {
        "actions": array(
            closed(
                {
                    "title": text(MAX_TITLE),
                    "description": text(MAX_STEP_LENGTH),
                    "command": text(MAX_COMMAND),
                    "needs": array(text(MAX_NEED), MAX_NEEDS),
                    "danger": text(MAX_STEP_LENGTH),
                    "undo": text(MAX_COMMAND),
                    "check": text(MAX_COMMAND),
                    "priority": {"type": "string", "enum": list(PRIORITIES.values())},
                },
                required=["title", "priority"],
            ),
            MAX_STEPS,
        ),
        "source": text(160),
        "attack_vectors": array(text(MAX_STEP_LENGTH), MAX_STEPS),
        "business_impact": text(MAX_STEP_LENGTH),
    },
    required=["actions"],
)


def correlation(members: int) -> Schema:
    """Returns the schema of a correlation, as in ``ground_truth_v1`` but without its id.

    Args:
        members: largest number of findings that it may refer to.
    """
    return closed(
        {
            "title": text(MAX_TITLE),
            "related_finding_ids": array(text(MAX_ID), members),
            "severity": SEVERITY,
            "risk_score": RISK_SCORE,
            "risk_score_delta": {"type": "integer", "minimum": -100, "maximum": 100},
            "rationale": text(MAX_RATIONALE),
            "tags": array(text(MAX_TAG), MAX_TAGS),
        },
        required=["title", "related_finding_ids"],
    )


def is_valid(answer: Any, schema: Schema) -> bool:
    """Returns whether an answer validates against a JSON Schema (draft 2020-12)."""
    return bool(_validator(orjson.dumps(schema)).is_valid(answer))


@lru_cache(maxsize=32)
def _validator(schema: bytes) -> Draft202012Validator:
    from jsonschema import Draft202012Validator  # takes a third of a second to import

    return Draft202012Validator(orjson.loads(schema))
