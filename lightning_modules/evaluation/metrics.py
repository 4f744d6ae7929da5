"""What answers are worth: torchmetrics over judged answers, each a few sums that add up over batches and ranks.

They know nothing of the model: they read :class:`~lightning_modules.evaluation.answer_parsing.ParsedAnswer` answers,
so a baseline, a model
and a remote service are measured alike. What is counted is strict: an answer that is not one JSON object has no
severity (so it is wrong), no number (so it is missing from the error, whose own count is given) and no tags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from datamodules.records import SEVERITIES
from lightning_modules.evaluation.answer_parsing import (
    ParsedAnswer,
    as_number,
    embedded,
    identifiers,
    named_ids,
    numbers,
    strings,
    words,
)

if TYPE_CHECKING:
    from datamodules.tasks.base import Task

INVALID = len(SEVERITIES)  #: column of the confusion matrix for answers without one of the severities
ECE_BINS = 10
_OF_ONE_FINDING = {"severity", "risk_score", "risk_subscores", "probability_actionable", "tags"}


class AnswerMetric(Metric):
    """A metric that is a function of sums over answers.

    Subclasses name their sums and say what one answer adds to them.
    """

    sums: ClassVar[tuple[str, ...]] = ()
    full_state_update = False
    is_differentiable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.sums:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, judged: Sequence[ParsedAnswer]) -> None:
        """Adds answers."""
        for item in judged:
            for name, value in self.count(item).items():
                setattr(self, name, self.total(name) + value)

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """What one answer adds to each sum; a sum that is left out gets nothing."""
        raise NotImplementedError

    def total(self, name: str) -> Tensor:
        """A sum."""
        value: Tensor = getattr(self, name)
        return value

    def ratio(self, part: str, whole: str) -> Tensor:
        """A quotient of two sums; NaN where the second is nothing."""
        return _ratio(self.total(part), self.total(whole))


class Validity(AnswerMetric):
    """Shares of answers that are JSON, conform to the schema, have exactly the expected keys, and are whole.

    ``json_cut`` is the share that the sys-scan-graph agent could read, which cuts from the first ``{`` to the last
    ``}``.
    """

    sums = ("answers", "json", "json_cut", "schema_valid", "exact_keys", "complete")

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """One for each property that holds."""
        exact = item.answer is not None and item.answer.keys() == item.expected.keys()
        return {
            "answers": 1, "json": item.answer is not None, "json_cut": item.cut is not None,
            "schema_valid": item.valid, "exact_keys": exact, "complete": item.complete,
        }  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        """``answers`` and the shares of them."""
        shares = {name: self.ratio(name, "answers") for name in self.sums[1:]}
        return {"answers": self.total("answers"), **shares}


class SeverityAgreement(Metric):
    """Accuracy and macro-F1 of ``severity``; an answer without one of the severities is wrong.

    Macro-F1 is the mean over the classes that occur among the expected ones, so that it can reach 1 on a small sample.

    Attributes:
        confusion: [expected severity, answered severity or :data:`INVALID`], counts.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(
            "confusion", torch.zeros(len(SEVERITIES), INVALID + 1, dtype=torch.float64), dist_reduce_fx="sum"
        )

    def update(self, judged: Sequence[ParsedAnswer]) -> None:
        """Adds answers; those whose expected answer has no severity don't count."""
        for item in judged:
            expected, answered = severity_classes(item)
            if expected != INVALID:
                self.confusion[expected, answered] += 1

    def compute(self) -> dict[str, Tensor]:
        """``severity_accuracy``, ``severity_macro_f1`` and ``severity_f1_<class>`` of the classes that occur."""
        right, total = self.confusion.diagonal(), self.confusion.sum()
        f1 = f1_scores(self.confusion)
        occurs = self.confusion.sum(1) > 0
        result = {
            "severity_accuracy": _ratio(right.sum(), total),
            "severity_macro_f1": f1[occurs].mean() if occurs.any() else torch.full_like(total, torch.nan),
        }
        return result | {f"severity_f1_{name}": f1[i] for i, name in enumerate(SEVERITIES) if occurs[i]}


class NumberError(AnswerMetric):
    """Mean absolute error of numbers in the answer, over those that are there, and the share that is.

    Args:
        name: prefix of the results.
        read: picks the numbers out of an answer or an expected answer: name -> value.
        **kwargs: of ``torchmetrics.Metric``.
    """

    sums = ("error", "answered", "asked")

    def __init__(self, name: str, read: Callable[[dict[str, Any]], dict[str, float]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name, self.read = name, read

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """The absolute errors of the numbers that both have."""
        expected, answer = self.read(item.expected), self.read(item.answer or {})
        both = expected.keys() & answer.keys()
        error = sum(abs(expected[key] - answer[key]) for key in both)
        return {"error": error, "answered": len(both), "asked": len(expected)}

    def compute(self) -> dict[str, Tensor]:
        """``<name>_error`` (NaN where no answer has a number) and ``<name>_answered``, a share."""
        return {
            f"{self.name}_error": self.ratio("error", "answered"),
            f"{self.name}_answered": self.ratio("answered", "asked"),
        }


class Calibration(Metric):
    """Brier score and expected calibration error of ``probability_actionable``.

    The data holds no outcome but the probability q that the finding is actionable. Both figures are the expectations
    over an outcome drawn with q: Brier q (1-p)^2 + (1-q) p^2, whose least value is the mean of q (1-q), and in each of
    ten bins of p the distance between the means of p and q. For q of 0 or 1 they are the usual ones.
    """

    full_state_update = False
    bins: Tensor
    brier: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("bins", torch.zeros(ECE_BINS, 3, dtype=torch.float64), dist_reduce_fx="sum")  # n, sum p, sum q
        self.add_state("brier", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, judged: Sequence[ParsedAnswer]) -> None:
        """Adds answers; those without a probability in 0..1 on either side don't count."""
        for item in judged:
            q = as_number(item.expected.get("probability_actionable"))
            p = as_number((item.answer or {}).get("probability_actionable"))
            if q is None or p is None or not 0 <= p <= 1:
                continue
            self.brier += q * (1 - p) ** 2 + (1 - q) * p**2
            self.bins[min(int(p * ECE_BINS), ECE_BINS - 1)] += torch.tensor(
                [1.0, p, q], dtype=self.bins.dtype, device=self.bins.device
            )

    def reliability(self) -> list[tuple[float, float, float]]:
        """For each bin that has answers: their number, the mean answered and the mean expected probability."""
        return [(n, p / n, q / n) for n, p, q in self.bins.tolist() if n]

    def compute(self) -> dict[str, Tensor]:
        """``actionable_brier`` and ``actionable_ece``."""
        n = self.bins[:, 0].sum()
        gap = (self.bins[:, 1] - self.bins[:, 2]).abs().sum()
        return {"actionable_brier": _ratio(self.brier, n), "actionable_ece": _ratio(gap, n)}


class SetF1(AnswerMetric):
    """Micro-averaged F1 of a set of strings in the answer against the expected one.

    Args:
        name: prefix of the results.
        read: picks the set out of an answer or an expected answer.
        **kwargs: of ``torchmetrics.Metric``.
    """

    sums = ("both", "answered", "expected", "exact", "answers")

    def __init__(self, name: str, read: Callable[[dict[str, Any]], set[Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name, self.read = name, read

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """Sizes of the two sets and of their intersection."""
        expected, answered = self.read(item.expected), self.read(item.answer or {})
        return {
            "both": len(expected & answered), "answered": len(answered), "expected": len(expected),
            "exact": item.answer is not None and expected == answered, "answers": 1,
        }  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        """``<name>_f1`` and ``<name>_exact``, the share of answers with exactly the expected set."""
        return {
            f"{self.name}_f1": _ratio(2 * self.total("both"), self.total("answered") + self.total("expected")),
            f"{self.name}_exact": self.ratio("exact", "answers"),
        }


class Faithfulness(AnswerMetric):
    """Whether what an answer names stands in its input.

    ``ids_invented`` is the share of the ids in answers (under keys for ids, and names like ``proc_12`` or ``/tmp/x`` in
    sentences) that the input does not hold; ``numbers_invented`` the same for numbers in its sentences (a count of
    findings that the model made itself is not in the input: the input or the expected answer excuses a number or a
    name); ``faithful`` is the share of answers that invent nothing, not being JSON counts as unfaithful.
    """

    sums = ("ids", "false_ids", "numbers", "false_numbers", "faithful", "answers")

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """The ids and numbers of one answer and how many are invented."""
        if item.answer is None:
            return {"answers": 1}
        known = set(strings(list(embedded(item.content))))
        sentences = [text for text in strings(item.answer) if text not in known]
        names = [name for text in sentences for name in identifiers(text)]
        given_text = "\n".join([item.content, *known, *strings(item.expected)])
        ids = list(named_ids(item.answer))
        false_ids = sum(name not in known for name in ids) + sum(name not in given_text for name in names)
        rest = " ".join(sentences)
        for name in names:
            rest = rest.replace(name, " ")  # its digits are no numbers
        said = numbers(rest)
        given = {*numbers(item.content), *(n for text in strings(item.expected) for n in numbers(text))}
        false_numbers = sum(number not in given for number in said)
        return {
            "ids": len(ids) + len(names), "false_ids": false_ids, "numbers": len(said), "false_numbers": false_numbers,
            "faithful": false_ids == 0 and false_numbers == 0, "answers": 1,
        }  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        """``ids_invented``, ``numbers_invented`` and ``faithful``."""
        return {
            "ids_invented": self.ratio("false_ids", "ids"),
            "numbers_invented": self.ratio("false_numbers", "numbers"),
            "faithful": self.ratio("faithful", "answers"),
        }


class WordOverlap(AnswerMetric):
    """Mean over answers of the F1 between the words of the answer and of the expected one (ROUGE-1, Lin 2004)."""

    sums = ("overlap", "answers")

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """F1 of the two multisets of words."""
        expected, answered = (words(list(strings(value))) for value in (item.expected, item.answer or {}))
        both = sum(min(expected.count(word), answered.count(word)) for word in set(answered))
        total = len(expected) + len(answered)
        return {"overlap": 2 * both / total if total else 1.0, "answers": 1}

    def compute(self) -> dict[str, Tensor]:
        """``word_overlap``."""
        return {"word_overlap": self.ratio("overlap", "answers")}


class AnswerMetrics(MetricCollection):
    """Everything that can be said of a task's answers, chosen by the properties of its schema.

    Args:
        task: whose answers are measured.
        **kwargs: of ``torchmetrics.Metric``; ``sync_on_compute=False`` where every rank saw all answers.
    """

    def __init__(self, task: Task, **kwargs: Any) -> None:
        keys = set(task.answer_schema.get("properties", {}))
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
            if "actions" not in keys:  # a command may hold numbers (a mode, a port to allow) that no input holds
                metrics["faithfulness"] = Faithfulness(**kwargs)
        super().__init__(metrics, compute_groups=False)  # type: ignore[arg-type]

    def results(self) -> dict[str, float]:
        """All figures, reduced over ranks: name -> value, NaN where nothing could be measured."""
        return {name: value.item() for name, value in self.compute().items()}

    def reliability(self) -> list[tuple[float, float, float]] | None:
        """See :meth:`Calibration.reliability`; None where the task has no probability."""
        return self["calibration"].reliability() if "calibration" in self else None  # type: ignore[operator]

    def confusion(self) -> list[list[int]] | None:
        """Severity confusion matrix of this rank's answers, rows expected, last column no severity."""
        for metric in self.values():
            if isinstance(metric, SeverityAgreement):
                return metric.confusion.long().tolist()
        return None


def severity_classes(item: ParsedAnswer) -> tuple[int, int]:
    """Expected and answered severity as indices; :data:`INVALID` where there is none."""
    return _severity(item.expected), _severity(item.answer or {})


def f1_scores(confusion: Tensor) -> Tensor:
    """F1 of each class from counts [..., classes, classes + 1]; 0 for a class that is neither expected nor answered."""
    classes = confusion.shape[-2]
    right = confusion[..., :classes].diagonal(dim1=-2, dim2=-1)
    total = confusion.sum(-1) + confusion[..., :classes].sum(-2)
    return 2 * right / total.clamp(min=1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """A quotient of sums; NaN of nothing."""
    return part / whole if whole > 0 else torch.full_like(part, torch.nan)


def _severity(answer: dict[str, Any]) -> int:
    value = answer.get("severity")
    return SEVERITIES.index(value) if value in SEVERITIES else INVALID


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
    """Commands and checks of a remediation, word for word: one that differs by a letter is another command."""
    return {text for step in _steps(answer) for key in ("command", "check") if isinstance(text := step.get(key), str)}


def _titles(answer: dict[str, Any]) -> set[str]:
    return {title for step in _steps(answer) if isinstance(title := step.get("title"), str)}


def _steps(answer: dict[str, Any]) -> list[dict[str, Any]]:
    steps = answer.get("actions")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
