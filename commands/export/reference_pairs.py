"""Held-out questions to certify an export with: those that the fit was evaluated on, or others of the same split."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from datamodules.findings import FindingsDataModule
from datamodules.tasks.base import Pair

if TYPE_CHECKING:
    from commands.model_source import Trained


def reference_pairs(trained: Trained, task: str, count: int) -> tuple[list[Pair], str]:
    """Finds held-out pairs: in the run's evaluation.json if it has enough, else in its data.

    Args:
        trained: of a run folder.
        task: whose questions.
        count: how many; 0 asks for none.

    Returns:
        The pairs, and where they are from.

    Raises:
        UserError: the data can't be read, or hold nothing out.
    """
    if count == 0:
        return [], ""
    pairs, split = _evaluated(trained, task)
    if len(pairs) >= count:
        return pairs[:count], f"evaluation.json ({split})"
    settings = trained.config.get("data", {})
    way_out = (
        f"give --num_reference {len(pairs)}" if pairs else "give --num_reference 0 to export without a measurement"
    )
    if str(settings.get("class_path", "")).rpartition(".")[2] != FindingsDataModule.__name__:
        raise UserError(f"--num_reference {count}: the run's data are no FindingsDataModule; {way_out}")
    arguments: dict[str, Any] = dict(settings.get("init_args") or {}) | {"tokenizer": trained.tokenizer}
    split = "val" if arguments.get("val", 0.02) else "test"
    try:
        data = FindingsDataModule(**arguments)
        data.setup()
        pairs = data.pairs(split, task, count)  # type: ignore[arg-type]
    except (TypeError, OSError, UserError) as error:
        raise UserError(f"--num_reference {count}: the run's data can't be read ({error}); {way_out}") from error
    if not pairs:
        raise UserError(f"--num_reference {count}: the run's data hold no pair of {task} out; {way_out}")
    return pairs, f"data ({split})"


def _evaluated(trained: Trained, task: str) -> tuple[list[Pair], str]:
    """The questions of the run's evaluation; none where it has none."""
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
