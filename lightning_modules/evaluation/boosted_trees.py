"""A gradient-boosted tree on the finding's fields: what machine learning without a language model makes of them.

Shapes in names: N findings, F features.

Fields become columns as a data scientist would make them in an hour: numbers as they are, every other value as
"field=value" (seen at least thrice), and the words of title, description and values as present or not. One classifier
for the severity, one regressor for each number; tags are those of the title look-up. The trees are scikit-learn's, half
as many as by default.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import UserError
from datamodules.records import SEVERITIES
from datamodules.tasks.base import compact_json, round_number
from lightning_modules.evaluation.answer_parsing import as_number, parse
from lightning_modules.evaluation.baselines import TitleLookup

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair

COLUMNS = 192  #: the most frequent features that are kept
TREES = {"max_iter": 50, "max_leaf_nodes": 15, "random_state": 0}  #: a few seconds for seven targets of 2,000 findings
SEEN = 3  #: findings that a text feature must occur in
RANGES = {"risk_score": 100.0}  #: highest value of a number; all others are shares
_WORD = re.compile(r"[^\W\d_]{3,24}")


class BoostedTrees:
    """Says what trees over the training findings' fields say.

    Args:
        pairs: training pairs of the risk task.

    Raises:
        UserError: scikit-learn is not installed.
    """

    name = "boosted trees"

    def __init__(self, pairs: Sequence[Pair]) -> None:
        try:
            from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
            from threadpoolctl import ThreadpoolController
        except ImportError as error:
            raise UserError(
                "the baseline of boosted trees needs scikit-learn; run `pip install scikit-learn`"
            ) from error
        self._tags = TitleLookup(pairs)
        answers = [parse(pair.completion) or {} for pair in pairs]
        features = [dict(features_of(parse(pair.content) or {})) for pair in pairs]
        counts = Counter(name for row in features for name in row)
        self._columns = [name for name, count in counts.most_common(COLUMNS) if count >= SEEN or name[0] == "#"]
        features_NF = self._matrix(features)
        self._trees: dict[str, Any] = {}
        self._one_thread = partial(ThreadpoolController().limit, limits=1, user_api="openmp")
        for name in _numbers(answers):
            values = [_read(answer, name) for answer in answers]
            has = np.array([value is not None for value in values])
            target = np.array([value for value in values if value is not None])
            with self._one_thread():  # threads that wait for each other take minutes where other work has the cores
                self._trees[name] = _fit(HistGradientBoostingRegressor(**TREES), features_NF[has], target)
        severities = np.array([answer.get("severity") in SEVERITIES for answer in answers])
        target = np.array([answer["severity"] for answer, known in zip(answers, severities, strict=True) if known])
        with self._one_thread():
            self._severity = _fit(HistGradientBoostingClassifier(**TREES), features_NF[severities], target)

    def __call__(self, content: str) -> str:
        """Returns the answer to a prompt's content."""
        with self._one_thread():
            return self._answer(content)

    def _answer(self, content: str) -> str:
        row_1F = self._matrix([dict(features_of(parse(content) or {}))])
        answer: dict[str, Any] = {"tags": (parse(self._tags(content)) or {}).get("tags", [])}
        answer["severity"] = str(self._severity(row_1F)[0])
        for name, tree in self._trees.items():
            value = round_number(min(max(float(tree(row_1F)[0]), 0.0), RANGES.get(name, 1.0)))
            outer, _, inner = name.partition(".")
            if inner:
                answer.setdefault(outer, {})[inner] = value
            else:
                answer[outer] = value
        return compact_json(answer)

    def _matrix(self, rows: Sequence[dict[str, float]]) -> NDArray[np.float64]:
        # a number that is not there is NaN, which trees know; a text that is not there is 0
        return np.array(
            [[row.get(name, np.nan if name[0] == "#" else 0.0) for name in self._columns] for row in rows], np.float64
        ).reshape(len(rows), len(self._columns))


def features_of(finding: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Features of a finding as a prompt shows it: ``#path`` for numbers, ``path=value`` and words for texts."""
    for path, value in _leaves(finding):
        figure = as_number(float(value) if isinstance(value, str) and _is_number(value) else value)
        if figure is not None:
            yield f"#{path}", figure
        text = str(value).lower()
        if len(text) <= 64:
            yield f"={path}={text}", 1.0
        for word in _WORD.findall(text):
            yield f"_{word}", 1.0


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, path)
    elif value is not None:
        yield path, value


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", text) is not None


def _numbers(answers: Sequence[dict[str, Any]]) -> list[str]:
    """Paths of the numbers that answers have, "a.b" for one inside an object."""
    names: dict[str, None] = {}
    for answer in answers:
        for key, value in answer.items():
            inner = value if isinstance(value, dict) else {"": value}
            names |= {f"{key}.{k}" if k else key: None for k, item in inner.items() if as_number(item) is not None}
    return list(names)


def _read(answer: dict[str, Any], name: str) -> float | None:
    outer, _, inner = name.partition(".")
    value = answer.get(outer)
    return as_number(value.get(inner) if inner and isinstance(value, dict) else value)


def _fit(tree: Any, features_NF: NDArray[np.float64], target_N: NDArray[Any]) -> Any:
    """Fits a tree and returns its prediction; of one value only (no column, one class) that value."""
    if len(set(target_N.tolist())) == 1:
        return lambda rows: np.repeat(target_N[:1], len(rows))
    return tree.fit(features_NF, target_N).predict
