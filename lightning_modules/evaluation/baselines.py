"""What a model must beat: answers to the risk task without a model, from the training pairs alone.

They write the same JSON as a model, so that they pass through the same metrics. Counts and medians only: fitted in
milliseconds, and nothing to tune. The strongest one, a gradient-boosted tree, is in
:mod:`lightning_modules.evaluation.boosted_trees`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from datamodules.tasks.base import compact_json, round_number
from lightning_modules.evaluation.answer_parsing import as_number, parse

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair


class MajorityClass:
    """Says of every finding what most training findings got.

    Args:
        pairs: training pairs of the risk task.
    """

    name = "majority class"

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._answer = typical(answer for pair in pairs if (answer := parse(pair.completion)) is not None)

    def __call__(self, content: str) -> str:
        """Returns the answer to a prompt's content."""
        return self._answer


class TitleLookup:
    """Says what the training findings of the same category and title got; of unseen ones what most got.

    Args:
        pairs: training pairs of the risk task.

    Attributes:
        seen: distinct categories and titles.
    """

    name = "title look-up"

    def __init__(self, pairs: Sequence[Pair]) -> None:
        answers: dict[Hashable, list[dict[str, Any]]] = defaultdict(list)
        for pair in pairs:
            if (answer := parse(pair.completion)) is not None:
                answers[_title(pair.content)].append(answer)
        self._answers = {key: typical(group) for key, group in answers.items()}
        self._otherwise = MajorityClass(pairs)
        self.seen = len(answers)

    def __call__(self, content: str) -> str:
        """Returns the answer to a prompt's content."""
        return self._answers.get(_title(content)) or self._otherwise(content)


def input_determined_categories(pairs: Sequence[Pair], least: int = 10, share: float = 0.99) -> set[str]:
    """Categories in which the input tells the severity: findings alike but for their numbers have the same one.

    Some data carry severities that follow from nothing a scanner says. Where findings that are alike disagree, no model
    can be right on all of them, and its accuracy says little.

    Args:
        pairs: training pairs of the risk task.
        least: findings that have one like them which a category must have to be judged.
        share: of these that must have the severity most frequent among those alike.
    """
    alike: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for pair in pairs:
        alike[pair.category][re.sub(r"\d+", "0", pair.content)][pair.severity] += 1
    input_determined = set()
    for category, groups in alike.items():
        repeated = [group for group in groups.values() if group.total() > 1]
        count = sum(group.total() for group in repeated)
        if count >= least and sum(max(group.values()) for group in repeated) >= share * count:
            input_determined.add(category)
    return input_determined


def typical(answers: Iterable[dict[str, Any]]) -> str:
    """One answer in the place of many: the most frequent severity and tags, the medians of all numbers.

    Ties go to the severity or tags met first. Fields that no answer has are left out.

    Raises:
        ValueError: there are no answers.
    """
    group = list(answers)
    if not group:
        raise ValueError("a baseline needs training pairs whose completions are JSON objects")
    result: dict[str, Any] = {}
    for key in dict.fromkeys(key for answer in group for key in answer):
        value = _typical([answer[key] for answer in group if key in answer])
        if value is not None:
            result[key] = value
    return compact_json(result)


def _typical(values: list[Any]) -> Any:
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _typical([value[key] for value in values if key in value]) for key in keys}
    figures = [figure for value in values if (figure := as_number(value)) is not None]
    if len(figures) == len(values):
        return round_number(median(figures))
    frequent = Counter(map(compact_json, values)).most_common(1)[0][0]
    return next(value for value in values if compact_json(value) == frequent)


def _title(content: str) -> Hashable:
    finding = parse(content) or {}
    return finding.get("category"), finding.get("title")
