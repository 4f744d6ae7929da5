"""Metrics of an answer's form and of its fields: validity, numbers, and sets of strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_modules.evaluation.answer_parsing import ParsedAnswer
from lightning_modules.evaluation.metric_base import AnswerMetric, ratio


class Validity(AnswerMetric):
    """Shares of answers that are JSON, conform to the schema, have exactly the expected keys, and are complete.

    ``json_cut`` is the share that the sys-scan-graph agent could read, which reads from the first ``{`` to the last
    ``}``.
    """

    sums = ("answers", "json", "json_cut", "schema_valid", "exact_keys", "complete")

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """Returns 1 for each property that the answer has."""
        exact = item.answer is not None and item.answer.keys() == item.expected.keys()
        return {
            "answers": 1, "json": item.answer is not None, "json_cut": item.extracted is not None,
            "schema_valid": item.valid, "exact_keys": exact, "complete": item.complete,
        }  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        """Returns ``answers``, their number, and the share with each property."""
        shares = {name: self.ratio(name, "answers") for name in self.sums[1:]}
        return {"answers": self.total("answers"), **shares}


class NumberError(AnswerMetric):
    """Mean absolute error of the numbers that an answer has, and the share of expected numbers that it has.

    Args:
        name: prefix of the results.
        read: extracts the numbers from an answer or an expected answer: name -> value.
        **kwargs: arguments of ``torchmetrics.Metric``.
    """

    sums = ("error", "answered", "expected")

    def __init__(self, name: str, read: Callable[[dict[str, Any]], dict[str, float]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name, self.read = name, read

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """Returns the absolute error of the numbers that both have, and the counts."""
        expected, answer = self.read(item.expected), self.read(item.answer or {})
        both = expected.keys() & answer.keys()
        error = sum(abs(expected[key] - answer[key]) for key in both)
        return {"error": error, "answered": len(both), "expected": len(expected)}

    def compute(self) -> dict[str, Tensor]:
        """Returns ``<name>_error`` (NaN if no answer has a number) and ``<name>_answered``, a share."""
        return {
            f"{self.name}_error": self.ratio("error", "answered"),
            f"{self.name}_answered": self.ratio("answered", "expected"),
        }


class SetF1(AnswerMetric):
    """Micro-averaged F1 of a set of strings in the answer against the expected one.

    Args:
        name: prefix of the results.
        read: extracts the set from an answer or an expected answer.
        **kwargs: arguments of ``torchmetrics.Metric``.
    """

    sums = ("both", "answered", "expected", "exact", "answers")

    def __init__(self, name: str, read: Callable[[dict[str, Any]], set[Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name, self.read = name, read

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """Returns the sizes of the two sets and of their intersection."""
        expected, answered = self.read(item.expected), self.read(item.answer or {})
        return {
            "both": len(expected & answered), "answered": len(answered), "expected": len(expected),
            "exact": item.answer is not None and expected == answered, "answers": 1,
        }  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        """Returns ``<name>_f1`` and ``<name>_exact``, the share of answers with exactly the expected set."""
        return {
            f"{self.name}_f1": ratio(2 * self.total("both"), self.total("answered") + self.total("expected")),
            f"{self.name}_exact": self.ratio("exact", "answers"),
        }
