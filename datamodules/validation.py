"""Checks of the data module's options, and errors about data that can't be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from datamodules.errors import UserError
from datamodules.pretrained.locate import resolve
from datamodules.stream.splits import check_fractions

if TYPE_CHECKING:
    from datamodules.tasks import Task
    from datamodules.tokenization.chat_format import ChatFormat


def check_options(
    *,
    sequence_length: int,
    batch_size: int,
    task_weights: Mapping[str, float],
    severity_balance: float,
    val_fraction: float,
    test_fraction: float,
) -> None:
    """Checks options that can be checked without reading the data.

    Args:
        sequence_length: tokens per row.
        batch_size: rows per batch.
        task_weights: weight of each task.
        severity_balance: strength of the balance, 0..1.
        val_fraction: fraction of findings for validation.
        test_fraction: fraction of findings for test.

    Raises:
        UserError: an option has an unsupported value.
    """
    for option, value, smallest in (("sequence_length", sequence_length, 2), ("batch_size", batch_size, 1)):
        if value < smallest:
            raise UserError(f"data.init_args.{option}={value}: too small. Fix: set it to {smallest} or more")
    for task, weight in task_weights.items():
        if weight < 0:
            raise UserError(
                f"data.init_args.task_weights={dict(task_weights)}: the weight of {task} is negative. "
                "Fix: set it to 0 or more"
            )
    if not any(task_weights.values()):
        raise UserError(
            f"data.init_args.task_weights={dict(task_weights)}: no example is used. Fix: give a task a weight above 0"
        )
    if not 0 <= severity_balance <= 1:
        raise UserError(f"data.init_args.severity_balance={severity_balance}: outside 0..1. Fix: set it to 0..1")
    check_fractions(val_fraction, test_fraction)


def check_prefixes(chat: ChatFormat, tasks: Mapping[str, Task], sequence_length: int) -> None:
    """Checks that a row is longer than the instruction of each task.

    Args:
        chat: chat format of the tokenizer.
        tasks: tasks by name.
        sequence_length: tokens per row.

    Raises:
        UserError: an instruction does not fit.
    """
    for name, task in tasks.items():
        prefix = len(chat.prefix_ids(task))
        if prefix >= sequence_length:
            raise UserError(
                f"data.init_args.sequence_length={sequence_length}: not longer than the instruction of task {name} "
                f"({prefix} tokens). Fix: set it to some hundred tokens more than that"
            )


def check_token_ids(chat: ChatFormat, tasks: Mapping[str, Task], model: str) -> None:
    """Checks that the embedding of the model has a row for each token of the chat template.

    Args:
        chat: chat format of the tokenizer.
        tasks: tasks by name.
        model: name or folder of the model that the tokenizer belongs to. Without a model's config, nothing is checked.

    Raises:
        UserError: a token has no row.
    """
    rows = embedding_rows(model)
    used = {
        chat.bos_id,
        chat.eos_id,
        chat.pad_id,
        *(i for task in tasks.values() for i in chat.prompt_ids(task, ["{}"])[0]),
    }
    largest = max(index for index in used if index is not None)
    if rows is not None and largest >= rows:
        token = chat.tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"model.init_args.backbone.model_name_or_path={model}: the prompts use token {token!r} with id "
            f"{largest}, and the model's embedding has {rows} rows. Fix: use the tokenizer that the model was "
            "trained with"
        )


def embedding_rows(model: str) -> int | None:
    """Returns the number of rows of a model's embedding by its config; None if it has no config."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            resolve(model.removeprefix("random:"), weights=False), trust_remote_code=False
        )
    except (OSError, ValueError, UserError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def empty_epoch_error(
    sources: Sequence[str], tasks: Sequence[str], counts: Counter[str], *, batch_size: int, ranks: int
) -> UserError:
    """Returns the error for an epoch without a batch.

    Args:
        sources: specifications of the sources.
        tasks: names of the tasks.
        counts: counters of the epoch; see :class:`datamodules.stream.counters.PipelineCounters`.
        batch_size: rows per batch and rank.
        ranks: number of ranks.
    """
    examples = sum(n for name, n in counts.items() if name.startswith("examples."))
    if not examples:
        return UserError(
            f"data.init_args.sources={list(sources)}: no training example of tasks {list(tasks)} "
            f"({counts['records']} records, {counts['quarantined']} invalid, {counts['overflow']} examples too long). "
            "Fix: check sources, task_weights and sequence_length"
        )
    return UserError(
        f"data.init_args.batch_size={batch_size}: {examples} training examples fill fewer than the "
        f"{batch_size * ranks} rows that {ranks} ranks need. Fix: lower batch_size or sequence_length"
    )


def empty_split_error(split: str, fraction: float) -> UserError:
    """Returns the error for a held-out split without an example.

    Args:
        split: name of the split.
        fraction: its configured fraction.
    """
    return UserError(
        f"data.init_args.{split}_fraction={fraction}: leaves no {split} example in this data. "
        "Fix: raise it, or set it to 0 for a run without this split"
    )
