"""Known limits of a model: generated training data, weak categories, and titles that are unlike the training data."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from commands.analyze.assessment.title_index import MIN_SIMILARITY, TitleIndex
from commands.analyze.assessment.training_titles import TrainingTitles, training_titles
from datamodules.tasks.remediation import ALIASES

if TYPE_CHECKING:
    from pathlib import Path

    from commands.model_source import TrainedModel

MIN_ACCURACY = 0.75  #: a category with a lower held-out severity accuracy is reported as weak
GENERATED = "synthetic://"  #: start of a source of generated findings
MAX_LISTED = 12  #: categories in a line of the banner


@dataclass(frozen=True)
class KnownLimits:
    """Known limits of a model.

    Attributes:
        lines: sentences about the model that hold for every report.
        accuracy: correct severities and held-out questions by category; empty without an evaluation.
        trained_categories: categories of the training data; None if unknown.
        titles: titles of the training data; None if unknown.
    """

    lines: tuple[str, ...] = ()
    accuracy: dict[str, tuple[int, int]] = field(default_factory=dict)
    trained_categories: frozenset[str] | None = None
    titles: TitleIndex | None = None

    def annotate(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds ``known_limits``, a list of sentences, to each finding; it is empty if the model did not answer.

        Args:
            records: findings of the part ``enriched_findings``; changed in place.

        Returns:
            The limits for ``model_report``: ``banner`` (sentences), ``min_accuracy``, ``min_similarity``, the number of
            findings with a limit, and of findings with an unknown title.
        """
        unlike, unseen = 0, Counter[str]()
        for record in records:
            record["known_limits"] = notes = []
            if record["model_severity"] is None:
                continue
            category = ALIASES.get(record["category"], record["category"])
            if self.trained_categories is not None and category not in self.trained_categories:
                unseen[record["category"]] += 1
                notes.append(f"category {record['category']}: not in the training data")
            elif self._is_weak(category):
                correct, count = self.accuracy[category]
                notes.append(f"category {category}: {correct} of {count} held-out severities correct")
            if self.titles is not None and self.titles.similarity(record["title"]) < MIN_SIMILARITY:
                unlike += 1
                notes.append("title unlike the training data")
        banner = [*self.lines, *self._report_lines(unlike, unseen, len(records))]
        limited = sum(bool(record["known_limits"]) for record in records)
        if not banner and not limited:
            return {}
        return {
            "banner": banner, "min_accuracy": MIN_ACCURACY, "min_similarity": MIN_SIMILARITY,
            "findings": limited, "unlike_titles": unlike,
        }  # fmt: skip

    def _is_weak(self, category: str) -> bool:
        correct, count = self.accuracy.get(category, (0, 0))
        return count > 0 and correct < MIN_ACCURACY * count

    def _report_lines(self, unlike: int, unseen: Counter[str], findings: int) -> list[str]:
        lines = []
        if unseen:
            shown = ", ".join(f"{name} ({count})" for name, count in unseen.most_common(MAX_LISTED))
            lines.append(f"Categories of this report that the training data lacks: {shown}.")
        if unlike:
            lines.append(
                f"Findings with a title unlike every title of the training data: {unlike} of {findings}. "
                "The model's severity of these is a guess."
            )
        return lines


def known_limits(trained: TrainedModel) -> KnownLimits:
    """Returns the known limits of a trained model, from its run's config, evaluation and training data.

    Args:
        trained: a run; an export has no record of its training data.
    """
    if trained.run is None:
        line = "This model has no record of its training data and evaluation. To see its limits, give the run folder."
        return KnownLimits((line,))
    options = trained.config.get("data", {}).get("init_args", {})
    sources = [str(source) for source in options.get("sources") or []]
    accuracy, titles = category_accuracy(trained.run), training_titles(trained.run, options)
    return KnownLimits(
        (*_source_lines(sources), *_accuracy_lines(accuracy), *_title_lines(titles)),
        accuracy,
        None if titles is None else frozenset(ALIASES.get(name, name) for name in titles.categories),
        None if titles is None else TitleIndex(titles.titles),
    )


def category_accuracy(run: Path) -> dict[str, tuple[int, int]]:
    """Returns the correct severities and the number of questions by category, from the run's ``evaluation.json``.

    Args:
        run: run folder.

    Returns:
        Empty if the run has no evaluation of the task risk.
    """
    try:
        record = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        groups = record["tasks"]["risk"]["columns"]["tuned"]["groups"]["category"]
        rows = {name: (figures["severity_accuracy"], figures["answers"]) for name, figures in groups.items()}
        return {
            name: (round(share * count), round(count)) for name, (share, count) in rows.items() if share is not None
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _source_lines(sources: list[str]) -> list[str]:
    generated = [source for source in sources if source.startswith(GENERATED)]
    if not generated:
        return []
    part = "only" if len(generated) == len(sources) else "partly"
    return [f"It was trained {part} on generated findings ({GENERATED}), not on findings of real hosts."]


def _accuracy_lines(accuracy: dict[str, tuple[int, int]]) -> list[str]:
    if not accuracy:
        return ["The run has no evaluation by category: the accuracy of its severities is unknown."]
    correct, count = (sum(column) for column in zip(*accuracy.values(), strict=True))
    weak = {name: pair for name, pair in accuracy.items() if pair[0] < MIN_ACCURACY * pair[1]}
    text = f"It rated {correct} of {count} held-out findings with the correct severity"
    if not weak:
        return [f"{text}."] if correct < MIN_ACCURACY * count else []
    shown = ", ".join(f"{name} ({good} of {total})" for name, (good, total) in list(weak.items())[:MAX_LISTED])
    return [f"{text}. Below {MIN_ACCURACY:.0%}: {shown}."]


def _title_lines(titles: TrainingTitles | None) -> list[str]:
    return [] if titles else ["Its training data can't be read: titles of findings were not compared with them."]
