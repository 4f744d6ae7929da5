"""Metrics of an answer's sentences: whether the input supports them, and their words."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.evaluation.answer_parsing import (
    ParsedAnswer,
    embedded,
    identifiers,
    named_ids,
    numbers,
    strings,
    words,
)
from lightning_modules.evaluation.metric_base import AnswerMetric


class Faithfulness(AnswerMetric):
    """Shares of the ids and numbers in answers that their input does not contain.

    ``ids_invented`` is the share of invented ids: those under keys for ids, and names like ``proc_12`` or ``/tmp/x`` in
    sentences. ``numbers_invented`` is the share of invented numbers in sentences. A number or name is not invented if
    the input or the expected answer contains it: a correct count of findings is not in the input. ``faithful`` is the
    share of answers that invent nothing; an answer that is not JSON is not faithful.
    """

    sums = ("ids", "false_ids", "numbers", "false_numbers", "faithful", "answers")

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """Returns the number of ids and numbers in one answer, and how many of them are invented."""
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
        answered = numbers(rest)
        given = {*numbers(item.content), *(n for text in strings(item.expected) for n in numbers(text))}
        false_numbers = sum(number not in given for number in answered)
        return {
            "ids": len(ids) + len(names), "false_ids": false_ids,
            "numbers": len(answered), "false_numbers": false_numbers,
            "faithful": false_ids == 0 and false_numbers == 0, "answers": 1,
        }  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        """Returns ``ids_invented``, ``numbers_invented`` and ``faithful``."""
        return {
            "ids_invented": self.ratio("false_ids", "ids"),
            "numbers_invented": self.ratio("false_numbers", "numbers"),
            "faithful": self.ratio("faithful", "answers"),
        }


class WordOverlap(AnswerMetric):
    """Mean over answers of the F1 between the words of the answer and of the expected one (ROUGE-1, Lin 2004)."""

    sums = ("overlap", "answers")

    def count(self, item: ParsedAnswer) -> dict[str, float]:
        """Returns the F1 of the two multisets of words."""
        expected, answered = (words(list(strings(value))) for value in (item.expected, item.answer or {}))
        both = sum(min(expected.count(word), answered.count(word)) for word in set(answered))
        total = len(expected) + len(answered)
        return {"overlap": 2 * both / total if total else 1.0, "answers": 1}

    def compute(self) -> dict[str, Tensor]:
        """Returns ``word_overlap``."""
        return {"word_overlap": self.ratio("overlap", "answers")}
