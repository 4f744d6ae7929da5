"""Builders of expected answers and parsed answers, for tests of metrics."""

import json
import random
from types import SimpleNamespace

from datamodules.records import SEVERITIES
from datamodules.tasks.base import Pair
from lightning_modules.evaluation.answer_parsing import parse_answer
from lightning_modules.evaluation.metrics import AnswerMetrics

RISK = SimpleNamespace(
    name="risk",
    answer_schema={
        "type": "object",
        "required": ["severity", "risk_score", "risk_subscores", "probability_actionable", "tags"],
        "additionalProperties": False,
        "properties": {
            "severity": {"enum": list(SEVERITIES)},
            "risk_score": {"type": "number", "minimum": 0, "maximum": 100},
            "risk_subscores": {"type": "object"},
            "probability_actionable": {"type": "number", "minimum": 0, "maximum": 1},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
    },
)
CORRELATION = SimpleNamespace(
    name="correlation",
    answer_schema={
        "type": "object",
        "required": ["related_finding_ids"],
        "properties": {
            "related_finding_ids": {"type": "array", "items": {"type": "string"}},
            "why": {"type": "string"},
        },
    },
)


def answer(severity="low", risk=30.0, probability=0.5, tags=("a",), **more):
    """Builds an answer of the risk task."""
    subscores = {"impact": 0.5, "exposure": 0.1}
    value = {"severity": severity, "risk_score": risk, "risk_subscores": subscores}
    return value | {"probability_actionable": probability, "tags": list(tags)} | more


def parsed(expected, text, task=RISK, content="{}", complete=True):
    """Parses a text, or a value as JSON, as the answer to a pair with this expected answer."""
    pair = Pair(task.name, content, json.dumps(expected), expected.get("severity", ""), "network", 1)
    return parse_answer(task, pair, text if isinstance(text, str) else json.dumps(text), complete)


def results(items, task=RISK):
    """Computes all metrics of parsed answers."""
    metrics = AnswerMetrics(task)
    metrics.update(items)
    return metrics.results()


def random_answers(n, seed=0):
    """Yields random parsed answers, some of them invalid."""
    rng = random.Random(seed)
    for _ in range(n):
        expected = answer(rng.choice(SEVERITIES[:4]), rng.uniform(0, 100), rng.random(), rng.sample("abcdef", 3))
        answered = answer(rng.choice(SEVERITIES), rng.uniform(0, 100), rng.random(), rng.sample("abcdef", 2))
        broken = ['{"severity": "low"', "", json.dumps(answered | {"severity": ["low"], "risk_score": "70"})]
        yield parsed(expected, rng.choice([json.dumps(answered)] * 6 + broken))
