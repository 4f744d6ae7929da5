"""Blocks: grouping of documents, selection of examples, packing, carried examples, and restarts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.stream.blocks import BlockConfig, blocks, group_documents
from datamodules.stream.counters import PipelineCounters
from datamodules.stream.epoch_order import Place
from datamodules.stream.example_columns import Columns
from datamodules.stream.preprocessing import PreparedDocument
from datamodules.stream.resume import BlockStart
from tests.helpers.findings_data import example

CONFIG = BlockConfig(
    tasks={"risk": 1.0}, sequence_length=10, packing="packed", block_examples=12, first_block=4, seed=0
)  # fmt: skip


def documents(*sizes, make=lambda number: example(key=number, input_key=number)):
    """Prepared documents of numbered examples of 3 tokens."""
    prepared, number = [], 0
    for unit, size in enumerate(sizes):
        columns = Columns.of([make(n) for n in range(number, number + size)])
        prepared.append(PreparedDocument(Place(unit, 0, 0), columns, records=size))
        number += size
    return prepared


def build(prepared, config=CONFIG, start=None, counters=None, **options):
    options = {"rows_multiple": 1} | options
    counters = counters or PipelineCounters(1.0)
    return list(blocks(prepared, config, (start or BlockStart()).copy(), counters, **options))


def emitted(built):
    return [e.key for block in built for row in block.rows[: block.emit] for e in row.examples]


@pytest.mark.parametrize(
    ("sizes", "first_index", "groups"),
    [
        ([3, 3, 5, 7, 1], 0, [2, 2, 1]),  # 4 examples in the first block, 12 in the others
        ([3, 3, 5, 7, 1], 1, [4, 1]),
        ([4], 0, [1, 0]),
        ([], 0, [0]),
        ([0, 0], 0, [2]),
    ],
)
def test_groups_end_with_a_document_and_the_last_one_is_marked(sizes, first_index, groups):
    grouped = list(group_documents(documents(*sizes), CONFIG, first_index=first_index))
    assert [len(gathered) for gathered, _ in grouped] == groups
    assert [final for _, final in grouped] == [False] * (len(groups) - 1) + [True]


@pytest.mark.parametrize("packing", ["none", "packed", "shared_prefix"])
@pytest.mark.parametrize("rows_multiple", [1, 2, 5])
def test_every_example_is_emitted_once_but_for_the_tail(packing, rows_multiple):
    counters = PipelineCounters(1.0)
    config = replace(CONFIG, packing=packing)
    built = build(documents(5, 9, 14, 20, 2), config, counters=counters, rows_multiple=rows_multiple)
    keys = emitted(built)
    assert len(keys) == len(set(keys)) == 50 - counters.counts["tail"]
    assert all(block.emit % rows_multiple == 0 for block in built)
    assert counters.counts["examples.risk"] == counters.counts["records"] == 50
    assert keys != sorted(keys)


def test_evaluation_emits_every_example_in_its_last_block():
    built = build(documents(5, 9, 14, 20, 2), replace(CONFIG, training=False), rows_multiple=4)
    assert sorted(emitted(built)) == list(range(50))
    assert all(block.emit % 4 == 0 for block in built[:-1])


@pytest.mark.parametrize("packing", ["none", "packed"])
def test_a_block_can_be_built_again_from_its_start(packing):
    config = replace(CONFIG, packing=packing, severity_balance=0.5, tasks={"risk": 1.5})
    prepared = documents(5, 9, 14, 20, 2)
    built = build(prepared, config, rows_multiple=2)
    for index, block in enumerate(built):
        left = [d for d in prepared if block.start.place is None or d.place >= block.start.place]
        again = build(left, config, BlockStart.from_state_dict(block.start.state_dict()), rows_multiple=2)
        assert [[e.key for row in b.rows for e in row.examples] for b in again] == [
            [e.key for row in b.rows for e in row.examples] for b in built[index:]
        ]


def test_skipped_rows_count_for_the_first_block_only():
    built = build(documents(5, 30), replace(CONFIG, packing="none"), rows_multiple=4, skip=3)
    assert built[0].emit == 3  # 5 rows: 3 skipped, and the other 2 are no multiple of 4
    assert built[1].emit % 4 == 0


def test_duplicates_and_conflicts_are_counted_and_dropped():
    def make(number):
        return example(key=number % 7, input_key=number % 5)

    for keep, used in ((True, 7), (False, 5)):
        counters = PipelineCounters(1.0)
        config = replace(CONFIG, keep_conflicts=keep, training=False)
        built = build(documents(20, 15, make=make), config, counters=counters)
        assert len(emitted(built)) == used
        assert counters.counts["duplicates"] == 28
        assert counters.counts["conflicts"] == 2


def test_task_weights_repeat_and_drop_examples():
    def make(number):
        return example(key=number, input_key=number, task=("risk", "summary", "triage")[number % 3])

    config = replace(CONFIG, tasks={"risk": 2.0, "summary": 0.5}, packing="none")
    tasks = Counter(
        row.task for block in build(documents(*[30] * 10, make=make), config) for row in block.rows[: block.emit]
    )
    assert tasks["risk"] == 200
    assert 30 <= tasks["summary"] <= 70
    assert tasks["triage"] == 0


@pytest.mark.parametrize("balance_by", ["severity", "category", "both"])
def test_balance_evens_out_the_strata(balance_by):
    def make(number):
        severity, category = ("low", "high")[number % 10 == 0], ("network", "suid")[number % 5 == 0]
        return example(key=number, input_key=number, severity=severity, category=category)

    config = replace(
        CONFIG, severity_balance=1.0, balance_by=balance_by, packing="none", first_block=1000, block_examples=1000
    )
    rows = [row.examples[0] for block in build(documents(1000, make=make), config) for row in block.rows]
    strata = {
        "severity": lambda e: e.severity, "category": lambda e: e.category, "both": lambda e: (e.severity, e.category),
    }[balance_by]  # fmt: skip
    sizes = Counter(map(strata, rows))
    assert len(sizes) == (3 if balance_by == "both" else 2)
    assert max(sizes.values()) - min(sizes.values()) <= 2
    assert abs(len(rows) - 1000) <= 2


def test_too_long_examples_are_counted_and_stop_the_run_only_if_no_example_of_the_first_block_fits():
    def make(number):
        return example(range(4 + number % 4 * 2), (1, 2), key=number, input_key=number)  # 6, 8, 10 or 12 tokens

    counters = PipelineCounters(1.0)
    build(documents(8, make=make), counters=counters)
    assert counters.counts["overflow"] == 2
    with pytest.raises(UserError, match=r"sequence_length=5: shorter than each of the first 8 .* 6 to 12 tokens"):
        build(documents(8, make=make), replace(CONFIG, sequence_length=5))
    late = documents(8, 8, make=lambda n: example((1,), (2,), key=n) if n < 8 else make(n))
    assert len(emitted(build(late, replace(CONFIG, sequence_length=5)))) == 8


def test_the_order_depends_on_seed_epoch_and_block():
    def keys(seed=0, epoch=0, index=0):
        start = BlockStart(epoch=epoch, index=index)
        return emitted(build(documents(30), replace(CONFIG, seed=seed, packing="none"), start))

    assert keys() == keys()
    assert len({tuple(keys(*change)) for change in ((), (1,), (0, 1), (0, 0, 1))}) == 4


def test_carried_examples_alone_need_no_document():
    start = BlockStart(epoch=0, index=3, place=Place(9, 0, 0), carry=[example(key=1), example(key=2)])
    (block,) = build([], start=start)
    assert sorted(emitted([block])) == [1, 2]
    assert block.start.place == Place(np.iinfo(np.int64).max, 0, 0)
