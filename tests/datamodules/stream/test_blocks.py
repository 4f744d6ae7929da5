"""Order, places, dealing, the digest and the prefetch thread."""

import threading
import time
from collections import Counter

import numpy as np
import pytest

from datamodules.packing import Row
from datamodules.sources import open_source
from datamodules.stream.blocks import Block, BlockStart
from datamodules.stream.epoch_order import WHOLE, Place, Unit, epoch_order, walk
from datamodules.stream.example_columns import Columns
from datamodules.stream.loading import Cursor, DataShard, chain, prefetch, shard_batches
from datamodules.tokenization.chat_format import Example
from tests.helpers.findings_data import write_archive, write_folder


def example(key, prompt=(1, 2), completion=(3,), task="risk", severity="low", category="network"):
    prompt, completion = np.array(prompt, np.int32), np.array(completion, np.int32)
    return Example(task, 1, prompt, completion, key, key ^ 1, severity, category, 2)


# -------------------------------------------------------------------- order


def test_members_are_permuted_anew_in_each_epoch_but_an_archive_first_goes_in_file_order(tmp_path):
    sources = [
        open_source(str(write_folder(tmp_path / "folder", [1] * 12))),
        open_source(str(write_archive(tmp_path / "findings.tar.gz", [1] * 7))),
    ]
    first = epoch_order(sources, epoch=0, seed=0)
    assert sorted(first) == [*(Unit(0, member) for member in range(12)), Unit(1, WHOLE)]
    assert Counter(unit.source for unit in first) == {0: 12, 1: 1}
    assert first == epoch_order(sources, epoch=0, seed=0) != epoch_order(sources, epoch=0, seed=1)
    list(sources[1].raw_documents())
    second, third = (epoch_order(sources, epoch=epoch, seed=0) for epoch in (1, 2))
    assert Counter(unit.source for unit in second) == {0: 12, 1: 7}
    assert sorted(second) == sorted(third)
    assert second != third
    assert [unit.member for unit in second if unit.source == 1] != list(range(7))


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("archive", [False, True])
def test_walking_from_any_place_gives_the_rest(tmp_path, archive, epoch):
    sizes = [3, 1, 2, 5]
    path = write_archive(tmp_path / "a.tar.gz", sizes) if archive else write_folder(tmp_path / "f", sizes)
    sources = [open_source(str(path)), open_source(str(write_folder(tmp_path / "more", [1, 1], start=50)))]
    order = epoch_order(sources, epoch=epoch, seed=5)
    whole = [(place, raw.member) for place, _, raw in walk(sources, order)]
    assert len(whole) == 6
    for index, (place, _) in enumerate(whole):
        assert [(p, raw.member) for p, _, raw in walk(sources, order, place)] == whole[index:]
    assert list(walk(sources, order, Place(len(order), 0, 0))) == []


# -------------------------------------------------------------------- dealing


def blocks_of(*counts, start=0):
    numbers = iter(range(start, 1000))
    return [
        Block(BlockStart(index=index), [Row([example(next(numbers))]) for _ in range(count)], count)
        for index, count in enumerate(counts)
    ]


def keys(dealt):
    return [[row.examples[0].key for row in rows] for rows, _ in dealt]


def test_batches_go_to_ranks_in_turn_and_know_the_last():
    dealt = [
        list(shard_batches(blocks_of(8, 4), Cursor(BlockStart()), DataShard(rank, 2), batch_size=2)) for rank in (0, 1)
    ]
    assert keys(dealt[0]) == [[0, 1], [4, 5], [8, 9]]
    assert keys(dealt[1]) == [[2, 3], [6, 7], [10, 11]]
    for batches in dealt:
        assert [cursor.rows for _, cursor in batches] == [4, 8, 4]
        assert [cursor.batches for _, cursor in batches] == [1, 2, 3]
        assert [cursor.first for _, cursor in batches] == [True, False, False]
        assert [cursor.last for _, cursor in batches] == [False, False, True]


def test_held_out_rows_that_do_not_fill_a_group_are_dealt_with_empty_batches():
    dealt = [
        list(shard_batches(blocks_of(5), Cursor(BlockStart()), DataShard(rank, 2), batch_size=2)) for rank in (0, 1)
    ]
    assert [keys(batches) for batches in dealt] == [[[0, 1], [4]], [[2, 3], []]]
    limited = list(shard_batches(blocks_of(4, 4), Cursor(BlockStart()), DataShard(), batch_size=2, limit=5))
    assert keys(limited) == [[0, 1], [2, 3], [4]]
    assert list(shard_batches(blocks_of(0, 0), Cursor(BlockStart()), DataShard(), batch_size=2)) == []


def test_dealing_goes_on_inside_a_block():
    start = Cursor(BlockStart(place=Place(0, 0, 0)), rows=4, batches=2, digest=chain("", blocks_of(4)[0].rows))
    dealt = list(shard_batches(blocks_of(6), start, DataShard(), batch_size=2))
    assert keys(dealt) == [[4, 5]]
    cursor = dealt[0][1]
    assert (cursor.rows, cursor.batches, cursor.first, cursor.last) == (6, 3, False, True)
    assert (
        cursor.digest
        == list(shard_batches(blocks_of(6), Cursor(BlockStart()), DataShard(), batch_size=2))[-1][1].digest
    )


def test_the_digest_is_of_the_order_not_of_the_batches():
    rows = blocks_of(4)[0].rows
    assert chain("", rows) == chain(chain("", rows[:1]), rows[1:])
    assert chain("", rows) != chain("", rows[::-1])
    assert len(chain("", rows)) == 32


# -------------------------------------------------------------------- columns


def test_columns_give_back_the_examples():
    examples = [
        example(2**64 - 1, (1, 2, 3), (4, 5)),
        example(0, (9,), (8,), task="summary", severity="critical"),
        example(7, (1, 70_000), (6, 6, 6), category="suid"),
    ]
    parts = [Columns.of(examples[:1]), Columns.of([]), Columns.of(examples[1:])]
    for columns in (
        Columns.of(examples),
        Columns.join(parts),
        Columns.from_state_dict(Columns.of(examples).state_dict()),
    ):
        assert len(columns) == 3
        assert columns.lengths.tolist() == [5, 2, 5]
        for given, got in zip([examples[2], examples[0], examples[0]], columns.select([2, 0, 0]), strict=True):
            for name in Example.__slots__:
                assert np.array_equal(getattr(given, name), getattr(got, name)), name


# -------------------------------------------------------------------- prefetch


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_prefetch_passes_items_on_in_order(depth):
    assert list(prefetch(iter(range(50)), depth, lambda n: 2 * n)) == list(range(0, 100, 2))


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetch_raises_where_items_are_taken(depth):
    def items():
        yield 1
        raise KeyError("inside")

    stream = prefetch(items(), depth, lambda n: n)
    assert next(stream) == 1
    with pytest.raises(KeyError, match="inside"):
        next(stream)


def test_prefetch_is_bounded_and_stops_when_closed():
    made, closed = [], threading.Event()

    def items():
        try:
            for n in range(1000):
                made.append(n)
                yield n
        finally:
            closed.set()

    before = threading.active_count()
    stream = prefetch(items(), 3, lambda n: n)
    assert next(stream) == 0
    time.sleep(0.05)
    assert len(made) <= 1 + 3 + 1  # taken, queued, in the thread's hand
    stream.close()
    assert closed.is_set()
    assert threading.active_count() == before
