"""What a data module is asked for and can't do, said before or as soon as it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.errors import UserError

if TYPE_CHECKING:
    from collections import Counter

    from datamodules.findings import FindingsDataModule
    from datamodules.stream.loading import DataShard


def check_options(data: FindingsDataModule) -> None:
    """Checks what can be checked without reading.

    Raises:
        UserError: an option can't be served.
    """
    for option, value, low in (("sequence_length", data.sequence_length, 2), ("batch_size", data.batch_size, 1)):
        if value < low:
            raise UserError(f"data.init_args.{option}: {value} is too small; set it to {low} or more")
    for task, share in data.task_weights.items():
        if share < 0:
            raise UserError(f"data.init_args.task_weights: the share of {task} is {share}; set it to 0 or more")
    if not any(data.task_weights.values()):
        raise UserError(
            f"data.init_args.task_weights: {data.task_weights} uses no example; give a task a share above 0"
        )
    if not 0 <= data.severity_balance <= 1:
        raise UserError(f"data.init_args.severity_balance: {data.severity_balance} is not in 0..1")
    if data.val_fraction < 0 or data.test_fraction < 0 or data.val_fraction + data.test_fraction >= 1:
        raise UserError(
            f"data.init_args: val_fraction={data.val_fraction} and test_fraction={data.test_fraction} must be "
            "shares >= 0 with a sum below 1"
        )


def check_prefixes(data: FindingsDataModule) -> None:
    """Checks that rows hold more than a task's instruction.

    Raises:
        UserError: one does not fit.
    """
    for name, built in data.tasks.items():
        prefix = len(data.chat.prefix_ids(built))
        if prefix >= data.sequence_length:
            raise UserError(
                f"data.init_args.sequence_length: {data.sequence_length} is less than the instruction of task {name} "
                f"alone, {prefix} tokens; set it to some hundred more"
            )


def nothing_to_train(data: FindingsDataModule, share: DataShard, counts: Counter[str]) -> UserError:
    """Says why an epoch has no batch."""
    examples = sum(n for name, n in counts.items() if name.startswith("examples."))
    if not examples:
        return UserError(
            f"data.init_args.sources: {data.document_processor.specs} hold no training example of tasks "
            f"{list(data.task_weights)} "
            f"({counts['records']} records, {counts['quarantined']} unusable, {counts['overflow']} too long)"
        )
    return UserError(
        f"data.init_args.batch_size: {examples} training examples make less than the "
        f"{data.batch_size * share.ranks} rows that {share.ranks} ranks need; lower batch_size or sequence_length"
    )
