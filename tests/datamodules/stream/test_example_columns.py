"""Examples to columns and back, joined, and through a checkpoint."""

import numpy as np
import pytest
import torch

from datamodules.stream.example_columns import Columns, to_tensor
from datamodules.tokenization.chat_format import Example
from tests.helpers.findings_data import example

EXAMPLES = [
    example((1, 2, 3), (4, 5), key=2**64 - 1, prefix=1, findings=2),
    example((9,), (8,), key=0, task="summary", severity="critical"),
    example((1, 70_000), (6, 6, 6), key=7, input_key=2**63, category="suid"),
]


@pytest.mark.parametrize("form", ["built", "joined", "restored"])
def test_columns_return_the_examples(form):
    columns = {
        "built": lambda: Columns.of(EXAMPLES),
        "joined": lambda: Columns.join([Columns.of(EXAMPLES[:1]), Columns.of([]), Columns.of(EXAMPLES[1:])]),
        "restored": lambda: Columns.from_state_dict(Columns.of(EXAMPLES).state_dict()),
    }[form]()
    assert len(columns) == 3
    assert columns.lengths.tolist() == [5, 2, 5]
    expected = [EXAMPLES[2], EXAMPLES[0], EXAMPLES[0]]
    for given, got in zip(expected, columns.select([2, 0, 0]), strict=True):
        for name in Example.__slots__:
            assert np.array_equal(getattr(given, name), getattr(got, name)), name


def test_types_are_those_that_the_cache_and_checkpoints_store():
    columns = Columns.of(EXAMPLES)
    assert columns.tokens.tolist() == [1, 2, 3, 4, 5, 9, 8, 1, 70_000, 6, 6, 6]
    assert {columns.tokens.dtype, columns.prompts.dtype, columns.texts.dtype} == {np.dtype(np.int32)}
    assert {columns.keys.dtype, columns.inputs.dtype} == {np.dtype(np.uint64)}
    assert columns.texts.shape == (3, 3)


def test_no_examples_are_columns_too():
    columns = Columns.of([])
    assert len(columns) == len(Columns.from_state_dict(columns.state_dict())) == 0
    assert columns.select([]) == []
    assert columns.texts.shape == (3, 0)


def test_selected_ids_are_views():
    columns = Columns.of(EXAMPLES)
    assert np.shares_memory(columns.select([1])[0].prompt_ids, columns.tokens)


def test_tensors_do_not_share_memory_and_keep_the_bits_of_unsigned_keys():
    keys = np.array([2**64 - 1, 5], np.uint64)
    tensor = to_tensor(keys)
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == [-1, 5]
    keys[1] = 6
    assert tensor.tolist() == [-1, 5]
