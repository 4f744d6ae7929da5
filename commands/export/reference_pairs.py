"""Finds held-out questions for the certificate: those that the fit was evaluated on, or others of the same split."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from commands.config_safety import fill_secrets
from datamodules.errors import UserError, one_line
from datamodules.findings import FindingsDataModule
from datamodules.tasks.base import Pair

if TYPE_CHECKING:
    from commands.model_source import TrainedModel


def reference_pairs(trained: TrainedModel, task: str, count: int) -> tuple[list[Pair], str]:
    """Returns held-out pairs from the run's evaluation.json if it has enough, else from its data.

    Args:
        trained: model of a run folder.
        task: name of the task.
        count: number of pairs; 0 returns none.

    Returns:
        The pairs, and a text about their origin.

    Raises:
        UserError: the data can't be read, or the split has no pair of the task.
    """
    if count == 0:
        return [], ""
    pairs, split = _evaluated(trained, task)
    if len(pairs) >= count:
        return pairs[:count], f"evaluation.json ({split})"
    settings = trained.config.get("data", {})
    fix = f"Fix: give --num_reference {len(pairs)}." if pairs else "Fix: give --num_reference 0 (no measurement)."
    if str(settings.get("class_path", "")).rpartition(".")[2] != FindingsDataModule.__name__:
        raise UserError(f"--num_reference {count}: the run's data are no FindingsDataModule. {fix}")
    # the run may come from somebody else: nothing is written to a place that its config names
    filled = fill_secrets({"data": settings}, ())["data"]
    arguments: dict[str, Any] = dict(filled.get("init_args") or {}) | {"tokenizer": trained.tokenizer}
    arguments |= {"cache_dir": None, "quarantine_path": None}
    split = "val" if arguments.get("val_fraction", 0.02) else "test"
    try:
        data = FindingsDataModule(**arguments)
        data.setup()
        pairs = data.pairs(split, task, count)  # type: ignore[arg-type]
    except (TypeError, OSError, UserError) as error:
        raise UserError(
            f"--num_reference {count}: the run's data can't be read ({one_line(error, 400)}). {fix}"
        ) from error
    if not pairs:
        raise UserError(f"--num_reference {count}: split {split} of the run's data has no pair of task {task}. {fix}")
    return pairs, f"data ({split})"


def _evaluated(trained: TrainedModel, task: str) -> tuple[list[Pair], str]:
    """Returns the questions of the run's evaluation and their split; no questions without an evaluation."""
    assert trained.run is not None
    try:
        record = json.loads((trained.run / "evaluation.json").read_text(encoding="utf-8"))["tasks"][task]
        pairs = [_pair(task, question["content"], question["expected"]) for question in record["questions"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], ""
    return pairs, str(record.get("split", "val"))


def _pair(task: str, content: str, expected: str) -> Pair:
    answer = json.loads(expected)
    return Pair(task, content, expected, str(answer.get("severity", "")), "", 1)
