"""The metrics of a task's answers, chosen by the properties of its schema.

Metrics read :class:`~lightning_modules.evaluation.answer_parsing.ParsedAnswer` objects and know nothing of the model,
so that a baseline, a model and a remote service are measured in the same way. They are strict: an answer that is not
one JSON object has no severity (which counts as wrong), no number (the error leaves it out, and the share of answered
numbers is a figure of its own) and no tags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchmetrics import Metric, MetricCollection

from lightning_modules.evaluation.answer_parsing import as_number, named_ids, object_schema, strings
from lightning_modules.evaluation.classification_metrics import Calibration, SeverityAgreement
from lightning_modules.evaluation.field_metrics import NumberError, SetF1, Validity
from lightning_modules.evaluation.text_metrics import Faithfulness, WordOverlap

if TYPE_CHECKING:
    from datamodules.tasks.base import Task

_OF_ONE_FINDING = {"severity", "risk_score", "risk_subscores", "probability_actionable", "tags"}


class AnswerMetrics(MetricCollection):
    """All metrics that apply to a task's answers.

    Args:
        task: the task whose answers are measured.
        **kwargs: arguments of ``torchmetrics.Metric``; ``sync_on_compute=False`` if every rank has all answers.
    """

    def __init__(self, task: Task, **kwargs: Any) -> None:
        keys = set(object_schema(task.answer_schema).get("properties", {}))
        metrics: dict[str, Metric] = {"validity": Validity(**kwargs)}
        if "severity" in keys:
            metrics["severity"] = SeverityAgreement(**kwargs)
        if "risk_score" in keys:
            metrics["risk"] = NumberError("risk", _number_at("risk_score"), **kwargs)
        if "risk_subscores" in keys:
            metrics["subscores"] = NumberError("subscore", _subscores, **kwargs)
        if "probability_actionable" in keys:
            metrics["actionable"] = NumberError("actionable", _number_at("probability_actionable"), **kwargs)
            metrics["calibration"] = Calibration(**kwargs)
        if "tags" in keys:
            metrics["tags"] = SetF1("tags", lambda answer: set(strings(answer.get("tags"))), **kwargs)
        if keys & {"related_finding_ids", "top_findings"}:
            metrics["ids"] = SetF1("ids", lambda answer: set(named_ids(answer)), **kwargs)
        if "actions" in keys:
            metrics["commands"] = SetF1("commands", _commands, **kwargs)
            metrics["steps"] = SetF1("steps", _titles, **kwargs)
        if keys - _OF_ONE_FINDING:  # answers in sentences
            metrics["overlap"] = WordOverlap(**kwargs)
            if "actions" not in keys:  # a command may contain numbers (a file mode, a port) that no input has
                metrics["faithfulness"] = Faithfulness(**kwargs)
        super().__init__(metrics, compute_groups=False)  # type: ignore[arg-type]

    def results(self) -> dict[str, float]:
        """Returns all figures, reduced over ranks: name -> value, NaN if nothing could be measured."""
        return {name: value.item() for name, value in self.compute().items()}

    def reliability(self) -> list[tuple[float, float, float]] | None:
        """Returns :meth:`Calibration.reliability`; None if the task has no probability."""
        return self["calibration"].reliability() if "calibration" in self else None  # type: ignore[operator]

    def confusion(self) -> list[list[int]] | None:
        """Returns this rank's confusion matrix: rows are expected severities, the last column is no severity."""
        for metric in self.values():
            if isinstance(metric, SeverityAgreement):
                return metric.confusion.long().tolist()
        return None


def _number_at(key: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    def read(answer: dict[str, Any]) -> dict[str, float]:
        number = as_number(answer.get(key))
        return {} if number is None else {key: number}

    return read


def _subscores(answer: dict[str, Any]) -> dict[str, float]:
    scores = answer.get("risk_subscores")
    if not isinstance(scores, dict):
        return {}
    return {key: number for key, value in scores.items() if (number := as_number(value)) is not None}


def _commands(answer: dict[str, Any]) -> set[str]:
    """Returns the commands and checks of a remediation; two that differ in one letter are different commands."""
    return {text for step in _steps(answer) for key in ("command", "check") if isinstance(text := step.get(key), str)}


def _titles(answer: dict[str, Any]) -> set[str]:
    return {title for step in _steps(answer) if isinstance(title := step.get("title"), str)}


def _steps(answer: dict[str, Any]) -> list[dict[str, Any]]:
    steps = answer.get("actions")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
