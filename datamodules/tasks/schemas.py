"""JSON Schemas of the answers: strict enough to decode against, consistent with ``ground_truth_v1``.

All objects are closed and all strings and arrays bounded, so that a constrained decoder always ends.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson

from datamodules.records import SEVERITIES, SUBSCORES
from datamodules.tasks.remediation import MAX_STEP_LENGTH, MAX_STEPS, PRIORITIES

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

    from datamodules.tasks.base import Schema

MAX_TAGS = 16
MAX_TAG = 64
MAX_TITLE = 160
MAX_ID = 48  #: longest id that is shown as it is; the longest of the real shards has 43 characters
MAX_RATIONALE = 240
MAX_SUMMARY = 1200
MAX_TOP = 5  #: findings of a triage
MAX_LINES = 5  #: lines of a list in an agent's answer
MAX_COMMAND = 640  #: a command with its placeholders filled; commands are never cut


def text(length: int) -> Schema:
    """A string of bounded length."""
    return {"type": "string", "maxLength": length}


def number(low: float, high: float) -> Schema:
    """A number in a range."""
    return {"type": "number", "minimum": low, "maximum": high}


def array(items: Schema, most: int) -> Schema:
    """An array of bounded length."""
    return {"type": "array", "items": items, "maxItems": most}


def closed(properties: dict[str, Schema], required: list[str] | None = None) -> Schema:
    """An object with these keys and no others; all of them are required unless said otherwise."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


SEVERITY: Schema = {"type": "string", "enum": list(SEVERITIES)}
RISK_SCORE: Schema = number(0, 100)
SHARE: Schema = number(0, 1)

#: A document may lack subscores or probability, then its answers do; so only severity and score are required.
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
    """A correlation, as in ``ground_truth_v1`` but without its id.

    Args:
        members: how many findings it may name.
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
