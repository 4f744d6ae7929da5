"""What a data module is asked for and can't do, said before or as soon as it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.errors import UserError

if TYPE_CHECKING:
    from collections import Counter

    from datamodules.findings import FindingsDataModule
    from datamodules.stream.loading import Share


def check_options(data: FindingsDataModule) -> None:
    """Checks what can be checked without reading.

    Raises:
        UserError: an option can't be served.
    """
    for option, value, low in (("row_tokens", data.row_tokens, 2), ("batch_rows", data.batch_rows, 1)):
        if value < low:
            raise UserError(f"data.init_args.{option}: {value} is too small; set it to {low} or more")
    for task, share in data.shares.items():
        if share < 0:
            raise UserError(f"data.init_args.tasks: the share of {task} is {share}; set it to 0 or more")
    if not any(data.shares.values()):
        raise UserError(f"data.init_args.tasks: {data.shares} uses no example; give a task a share above 0")
    if not 0 <= data.balance <= 1:
        raise UserError(f"data.init_args.balance: {data.balance} is not in 0..1")
    if data.val < 0 or data.test < 0 or data.val + data.test >= 1:
        raise UserError(f"data.init_args: val={data.val} and test={data.test} must be shares >= 0 with a sum below 1")


def check_prefixes(data: FindingsDataModule) -> None:
    """Checks that rows hold more than a task's instruction.

    Raises:
        UserError: one does not fit.
    """
    for name, built in data.tasks.items():
        prefix = len(data.chat.prefix_ids(built))
        if prefix >= data.row_tokens:
            raise UserError(
                f"data.init_args.row_tokens: {data.row_tokens} is less than the instruction of task {name} "
                f"alone, {prefix} tokens; set it to some hundred more"
            )


def nothing_to_train(data: FindingsDataModule, share: Share, counts: Counter[str]) -> UserError:
    """Says why an epoch has no batch."""
    examples = sum(n for name, n in counts.items() if name.startswith("examples."))
    if not examples:
        return UserError(
            f"data.init_args.sources: {data._preparer.specs} hold no training example of tasks {list(data.shares)} "
            f"({counts['records']} records, {counts['quarantined']} unusable, {counts['overflow']} too long)"
        )
    return UserError(
        f"data.init_args.batch_rows: {examples} training examples make less than the "
        f"{data.batch_rows * share.ranks} rows that {share.ranks} ranks need; lower batch_rows or row_tokens"
    )
