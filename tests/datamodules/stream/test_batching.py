"""Distribution of rows over ranks, and the rows of held-out splits in memory."""

import pytest

from datamodules.packing import Row
from datamodules.stream.batching import DataShard, HeldOutRows, shard_batches
from datamodules.stream.blocks import Block
from datamodules.stream.epoch_order import Place
from datamodules.stream.resume import BlockStart, Cursor, extend_digest
from tests.helpers.findings_data import example


def blocks_of(*counts):
    """Blocks of rows of one example; the examples' keys are numbered through."""
    numbers = iter(range(1000))
    return [
        Block(BlockStart(index=index), [Row([example(key=next(numbers))]) for _ in range(count)], count)
        for index, count in enumerate(counts)
    ]


def batches_of(blocks, shard=None, start=None, **options):
    start = start or Cursor(BlockStart())
    return list(shard_batches(blocks, start, shard or DataShard(), batch_size=2, **options))


def keys(batches):
    return [[row.examples[0].key for row in rows] for rows, _ in batches]


def test_ranks_get_batches_in_turn_and_the_last_one_is_marked():
    sharded = [batches_of(blocks_of(8, 4), DataShard(rank, 2)) for rank in (0, 1)]
    assert keys(sharded[0]) == [[0, 1], [4, 5], [8, 9]]
    assert keys(sharded[1]) == [[2, 3], [6, 7], [10, 11]]
    for batches in sharded:
        assert [cursor.rows for _, cursor in batches] == [4, 8, 4]
        assert [cursor.batches for _, cursor in batches] == [1, 2, 3]
        assert [cursor.first for _, cursor in batches] == [True, False, False]
        assert [cursor.last for _, cursor in batches] == [False, False, True]


def test_an_incomplete_group_of_held_out_rows_gives_every_rank_a_batch():
    sharded = [batches_of(blocks_of(5), DataShard(rank, 2)) for rank in (0, 1)]
    assert [keys(batches) for batches in sharded] == [[[0, 1], [4]], [[2, 3], []]]


def test_a_limit_counts_rows_over_blocks():
    assert keys(batches_of(blocks_of(4, 4), limit=5)) == [[0, 1], [2, 3], [4]]
    assert keys(batches_of(blocks_of(4, 4), limit=4)) == [[0, 1], [2, 3]]


def test_empty_blocks_give_no_batch():
    assert batches_of(blocks_of(0, 0)) == []


def test_batches_continue_inside_a_block():
    consumed = extend_digest("", blocks_of(4)[0].rows)
    start = Cursor(BlockStart(place=Place(0, 0, 0)), rows=4, batches=2, digest=consumed)
    batches = batches_of(blocks_of(6), start=start)
    assert keys(batches) == [[4, 5]]
    cursor = batches[0][1]
    assert (cursor.rows, cursor.batches, cursor.first, cursor.last) == (6, 3, False, True)
    assert cursor.digest == batches_of(blocks_of(6))[-1][1].digest


@pytest.mark.parametrize(("max_tokens", "kept"), [(18, True), (17, False)])
def test_held_out_rows_are_kept_up_to_a_number_of_tokens(max_tokens, kept):
    rows, whole = HeldOutRows(max_tokens), DataShard()
    batches = batches_of(blocks_of(6))  # 6 rows of 3 tokens
    recorded = list(rows.record("val", whole, iter(batches)))
    assert recorded == [batch for batch, _ in batches]
    assert (rows.get("val", whole) is not None) == kept
    if kept:
        assert list(rows.get("val", whole)) == recorded
        assert rows.get("test", whole) is None
        assert rows.get("val", DataShard(1, 2)) is None


def test_held_out_rows_share_the_limit_among_ranks():
    rows, shard = HeldOutRows(18), DataShard(0, 2)  # 9 tokens per rank
    list(rows.record("val", shard, iter(batches_of(blocks_of(8), shard))))  # 4 rows of 3 tokens on this rank
    assert rows.get("val", shard) is None


def test_rows_of_an_interrupted_evaluation_are_not_kept():
    rows = HeldOutRows()
    recorded = rows.record("val", DataShard(), iter(batches_of(blocks_of(6))))
    next(recorded)
    recorded.close()
    assert rows.get("val", DataShard()) is None
