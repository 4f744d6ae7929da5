"""Results of one task for every model and baseline, and their JSON format."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.files import atomic_write
from lightning_modules.evaluation.evaluate import EvaluationScores, PredictionResult, score_predictions

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair, Task


@dataclass
class TaskResults:
    """Results of one task for every model and baseline.

    Attributes:
        task: the task.
        split: the split of the pairs.
        pairs: the held-out pairs.
        input_determined: categories whose severity the input determines.
        baselines: headings of the columns of baselines.
        columns: heading -> scores, in the table's order.
        seconds: heading -> duration of the measurement of a model.
        about: heading -> the step and checkpoint that were measured.
    """

    task: Task
    split: str
    pairs: list[Pair]
    input_determined: set[str] = field(default_factory=set)
    baselines: list[str] = field(default_factory=list)
    columns: dict[str, EvaluationScores] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of the prompts and expected answers; only columns with equal digests can be compared."""
        text = json.dumps([[pair.content, pair.completion] for pair in self.pairs])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def models(self) -> dict[str, EvaluationScores]:
        """The columns of models, without baselines."""
        return {name: scores for name, scores in self.columns.items() if name not in self.baselines}

    def add(self, heading: str, outcomes: list[PredictionResult], baseline: bool = False) -> None:
        """Computes the scores of predictions and adds them as a column.

        The untuned model is the first column, other models follow, baselines are last.

        Args:
            heading: name of the column; an existing column of this name is replaced.
            outcomes: one result per pair.
            baseline: True if the column is a baseline.
        """
        if baseline and heading not in self.baselines:
            self.baselines.append(heading)
        columns = {name: old for name, old in self.columns.items() if name != heading}
        columns[heading] = score_predictions(self.task, self.pairs, outcomes, self.input_determined)
        names = sorted(columns, key=lambda name: (name in self.baselines, name != "untuned"))
        self.columns = {name: columns[name] for name in names}

    def record(self) -> dict[str, Any]:
        """Returns the results in the JSON format; NaN becomes null."""
        return {
            "split": self.split, "n": len(self.pairs), "digest": self.digest, "baselines": self.baselines,
            "input_determined_categories": sorted(self.input_determined),
            "columns": {name: self._column(name, scores) for name, scores in self.columns.items()},
            "questions": [
                {"content": p.content, "expected": p.completion, "severity": p.severity, "category": p.category}
                for p in self.pairs
            ],
        }  # fmt: skip

    def _column(self, name: str, scores: EvaluationScores) -> dict[str, Any]:
        facts = {
            "figures": scores.figures, "intervals": scores.intervals, "confusion": scores.confusion,
            "groups": scores.groups, "reliability": scores.reliability, "seconds": self.seconds.get(name),
            "about": self.about.get(name, {}),
            "outcomes": [{k: v for k, v in asdict(item).items() if k != "constrained"} for item in scores.outcomes],
        }  # fmt: skip
        return {key: finite(value) for key, value in facts.items()}

    def load_column(self, record: dict[str, Any], heading: str) -> None:
        """Adds a model's column from an earlier record, if the record has it and its pairs are the same."""
        column = record.get("columns", {}).get(heading)
        if column is None or record.get("digest") != self.digest:
            return
        self.add(heading, scores_of(column).outcomes)
        self.seconds[heading], self.about[heading] = column["seconds"], column.get("about", {})


def scores_of(column: dict[str, Any]) -> EvaluationScores:
    """Returns the scores of a column in the JSON format; null becomes NaN."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    groups = {
        key: {name: {k: number(v) for k, v in figures.items()} for name, figures in parts.items()}
        for key, parts in column["groups"].items()
    }
    return EvaluationScores(
        {name: number(value) for name, value in column["figures"].items()},
        {name: (number(low), number(high)) for name, (low, high) in column["intervals"].items()},
        column["confusion"], groups, column["reliability"],
        [PredictionResult(**item | {"nll": number(item["nll"])}) for item in column["outcomes"]],
    )  # fmt: skip


def finite(value: Any) -> Any:
    """Returns a copy of a value for JSON, in which every number that is not finite is None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(file: Path, results: list[TaskResults], **facts: Any) -> None:
    """Writes results to a JSON file, in one step.

    Args:
        file: the file; its folder is created.
        results: the results of each task.
        **facts: further values at the top level of the file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    record = facts | {"tasks": {result.task.name: result.record() for result in results}}
    atomic_write(file, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_results(file: Path) -> dict[str, Any]:
    """Reads the records of a file by task; returns none if there is no such file or it is damaged."""
    try:
        tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return tasks if isinstance(tasks, dict) else {}
