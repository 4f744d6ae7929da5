"""Checks of options, and errors: each names option, value, problem and fix on one line."""

import json
import shutil
from collections import Counter

import pytest

from datamodules.errors import UserError
from datamodules.tasks import build_tasks
from datamodules.tokenization.chat_format import ChatFormat
from datamodules.validation import (  # fmt: skip
    check_options,
    check_prefixes,
    check_token_ids,
    embedding_rows,
    empty_epoch_error,
    empty_split_error,
)

VALID = {
    "sequence_length": 64, "batch_size": 1, "task_weights": {"risk": 1.0}, "severity_balance": 0.5,
    "val_fraction": 0.1, "test_fraction": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sequence_length": 2},
        {"severity_balance": 0},
        {"severity_balance": 1},
        {"task_weights": {"risk": 0.0, "summary": 2.5}},
        {"val_fraction": 0.0, "test_fraction": 0.99},
    ],
)
def test_valid_options_pass(change):
    check_options(**VALID | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 1}, r"data\.init_args\.sequence_length=1: too small\. Fix: set it to 2 or more"),
        ({"batch_size": 0}, r"data\.init_args\.batch_size=0: too small\. Fix: set it to 1 or more"),
        ({"task_weights": {"risk": -1}}, r"task_weights=\{'risk': -1\}: the weight of risk is negative\. Fix: "),
        ({"task_weights": {"risk": 0.0}}, r"task_weights=\{'risk': 0\.0\}: no example is used\. Fix: "),
        ({"task_weights": {}}, r"task_weights=\{\}: no example is used\. Fix: "),
        ({"severity_balance": 1.1}, r"severity_balance=1\.1: outside 0\.\.1\. Fix: "),
        ({"severity_balance": -0.1}, r"severity_balance=-0\.1: outside 0\.\.1\. Fix: "),
        (
            {"val_fraction": 0.6, "test_fraction": 0.4},
            r"val_fraction=0\.6 and test_fraction=0\.4 leave nothing .* Fix: ",
        ),
        ({"val_fraction": -0.1}, r"val_fraction=-0\.1 and test_fraction=0\.1 leave nothing .* Fix: "),
    ],
)
def test_invalid_options_are_named_with_their_fix(change, message):
    with pytest.raises(UserError, match=message) as caught:
        check_options(**VALID | change)
    assert "\n" not in str(caught.value)


def test_a_row_must_be_longer_than_each_instruction(mistral_tokenizer):
    chat, tasks = ChatFormat(mistral_tokenizer), build_tasks(["risk", "triage"])
    longest = max(tasks, key=lambda name: len(chat.prefix_ids(tasks[name])))
    prefix = len(chat.prefix_ids(tasks[longest]))
    check_prefixes(chat, tasks, prefix + 1)
    with pytest.raises(UserError, match=rf"sequence_length={prefix}: .* of task {longest} \({prefix} tokens\)\. Fix: "):
        check_prefixes(chat, tasks, prefix)


def test_an_epoch_without_examples_reports_the_counts():
    counts = Counter({"records": 9, "quarantined": 2, "overflow": 3})
    error = empty_epoch_error(["a.json"], ["risk"], counts, batch_size=2, ranks=4)
    assert str(error).startswith(
        "data.init_args.sources=['a.json']: no training example of tasks ['risk'] (9 records, 2"
    )
    assert "3 examples too long" in str(error)
    assert "Fix: " in str(error)


def test_an_epoch_of_too_few_examples_reports_the_rows_that_are_needed():
    error = empty_epoch_error(["a.json"], ["risk"], Counter({"examples.risk": 5}), batch_size=2, ranks=4)
    assert str(error).startswith("data.init_args.batch_size=2: 5 training examples fill fewer than the 8 rows")


def test_an_empty_split_names_its_fraction():
    assert str(empty_split_error("val", 0.001)).startswith("data.init_args.val_fraction=0.001: leaves no val example")


def test_a_template_token_without_a_row_in_the_embedding_is_refused(tiny_llama, tmp_path, chatml_tokenizer):
    """The model would raise IndexError at the first batch."""
    chat, tasks = ChatFormat(chatml_tokenizer), build_tasks(["risk", "summary"])
    check_token_ids(chat, tasks, str(tiny_llama))
    assert embedding_rows(str(tiny_llama)) == 259
    small = shutil.copytree(tiny_llama, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 2}))
    with pytest.raises(UserError, match=r"small: the prompts use token .* and the model's embedding has 2 rows"):
        check_token_ids(chat, tasks, str(small))
    (small / "config.json").unlink()  # the folder of a tokenizer
    assert embedding_rows(str(small)) is None
    check_token_ids(chat, tasks, str(small))
