"""The questions of one task, everybody's answers so far, and both as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.evaluation.evaluate import EvaluationScores, PredictionResult, score

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair, Task


@dataclass
class TaskResults:
    """The questions of one task and everybody's answers so far.

    Attributes:
        task: what is asked.
        split: where the pairs come from.
        pairs: the questions, held out.
        input_determined: categories whose severity the input tells.
        baselines: names of the columns that are no models.
        columns: heading -> scores, in the table's order.
        seconds: heading -> how long the model took.
        about: heading -> what was measured (step and checkpoint).
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
        """Digest of the questions and expected answers: only columns of the same one can be compared."""
        text = json.dumps([[pair.content, pair.completion] for pair in self.pairs])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def models(self) -> dict[str, EvaluationScores]:
        """The columns of models, without baselines."""
        return {name: scores for name, scores in self.columns.items() if name not in self.baselines}

    def add(self, heading: str, outcomes: list[PredictionResult], baseline: bool = False) -> None:
        """Scores answers into a column: models first, the untuned one before all; then the baselines."""
        if baseline and heading not in self.baselines:
            self.baselines.append(heading)
        columns = {name: old for name, old in self.columns.items() if name != heading}
        columns[heading] = score(self.task, self.pairs, outcomes, self.input_determined)
        names = sorted(columns, key=lambda name: (name in self.baselines, name != "untuned"))
        self.columns = {name: columns[name] for name in names}

    def record(self) -> dict[str, Any]:
        """The exam as JSON; NaN becomes null."""
        return {
            "split": self.split, "n": len(self.pairs), "digest": self.digest, "baselines": self.baselines,
            "severity_told_in": sorted(self.input_determined),
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
            "outcomes": [{k: v for k, v in asdict(item).items() if k != "held"} for item in scores.outcomes],
        }  # fmt: skip
        return {key: finite(value) for key, value in facts.items()}

    def remember(self, record: dict[str, Any], heading: str) -> None:
        """Takes a model's answers from an earlier record, if the questions were the same."""
        column = record.get("columns", {}).get(heading)
        if column is None or record.get("digest") != self.digest:
            return
        self.add(heading, scores_of(column).outcomes)
        self.seconds[heading], self.about[heading] = column["seconds"], column.get("about", {})


def scores_of(column: dict[str, Any]) -> EvaluationScores:
    """Scores as they were before they were written; null becomes NaN."""

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
    """A copy of a value that JSON can hold: what is no finite number becomes None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(file: Path, exams: list[TaskResults], **facts: Any) -> None:
    """Writes exams to a file, replaced as a whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished")
    record = facts | {"tasks": {exam.task.name: exam.record() for exam in exams}}
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(file)


def read_results(file: Path) -> dict[str, Any]:
    """The records of a file by task; none where there is no such file, or it is damaged."""
    try:
        tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return tasks if isinstance(tasks, dict) else {}
