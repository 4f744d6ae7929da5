"""The position in the data: digest, cursor, and its form in a checkpoint."""

import io

import numpy as np
import pytest
import torch

from datamodules.packing import Row
from datamodules.stream.dedup import Deduplicator
from datamodules.stream.epoch_order import Place
from datamodules.stream.resume import BlockStart, Cursor, ResumeState, extend_digest
from tests.helpers.findings_data import example


def start_in_the_middle():
    seen = Deduplicator()
    seen.add(np.array([5, 6, 7], np.uint64), np.array([50, 60, 70], np.uint64))
    carry = [example(key=2**64 - 1, input_key=3), example((1, 9), (4, 2), key=8, task="summary")]
    counters = {"counts": {"records": 12}, "quarantine_bytes": 34}
    return BlockStart(2, 3, Place(1, 0, 40), carry, seen, seen_keys=2, seen_inputs=2, counters=counters)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_digest_depends_on_the_order_and_not_on_the_batches():
    rows = [Row([example(key=key)]) for key in range(4)]
    assert extend_digest("", rows) == extend_digest(extend_digest("", rows[:1]), rows[1:])
    assert extend_digest("", rows) != extend_digest("", rows[::-1])
    assert extend_digest("", []) == ""
    # a fixed value: another one means that digests of existing checkpoints can't be compared any more
    assert extend_digest("", rows) == "fceb69add108a67ace19ee4547c672f5"


def test_a_block_start_survives_a_checkpoint():
    start = start_in_the_middle()
    start.seen.add(np.array([8], np.uint64), np.array([80], np.uint64))  # by the block itself
    restored = BlockStart.from_state_dict(through_a_file(start.state_dict()))
    for name in ("epoch", "index", "place", "seen_keys", "seen_inputs", "counters"):
        assert getattr(restored, name) == getattr(start, name), name
    assert restored.seen.keys.first(len(restored.seen.keys)).tolist() == [5, 6]
    assert restored.seen.inputs.first(len(restored.seen.inputs)).tolist() == [50, 60]
    assert [(e.key, e.input_key, e.task, e.prompt_ids.tolist()) for e in restored.carry] == [
        (2**64 - 1, 3, "risk", [1, 2]), (8, 8, "summary", [1, 9]),
    ]  # fmt: skip


def test_a_copy_has_its_own_set_of_seen_keys():
    start = start_in_the_middle()
    copy = start.copy()
    duplicate, _ = copy.seen.add(np.array([7, 5], np.uint64), np.array([70, 50], np.uint64))
    assert duplicate.tolist() == [False, True]  # 7 was seen after the start
    assert len(start.seen.keys) == 3


def test_the_last_batch_of_an_epoch_moves_the_cursor_to_the_next_epoch():
    state, cursor = ResumeState(), Cursor(start_in_the_middle(), rows=6, batches=9, digest="ab")
    assert state.cursor.at_epoch_start
    state.mark_consumed(cursor)
    assert state.cursor is cursor
    assert not cursor.at_epoch_start
    cursor.last = True
    state.mark_consumed(cursor)
    assert (state.cursor.start.epoch, state.cursor.rows, state.cursor.batches, state.cursor.digest) == (3, 0, 9, "ab")
    assert state.cursor.at_epoch_start


@pytest.mark.parametrize(("finished", "batches"), [(None, 2), (1, 1), (2, 2)])
def test_a_batch_whose_step_was_interrupted_is_not_consumed(finished, batches):
    state = ResumeState()
    for number in (1, 2):
        state.begin_batch(Cursor(BlockStart(), rows=number, batches=number), number)
    assert state.state_dict(finished)["batches"] == batches


def test_a_loaded_state_replaces_the_position_and_the_batch_in_progress():
    saved = ResumeState()
    saved.mark_consumed(Cursor(start_in_the_middle(), rows=6, batches=9, digest="ab"))
    state = ResumeState()
    state.begin_batch(Cursor(BlockStart(), rows=1, batches=1), 1)
    state.load_state_dict(through_a_file(saved.state_dict(None)))
    again = state.state_dict(0)
    assert (again["epoch"], again["block"], again["rows"], again["batches"], again["digest"]) == (2, 3, 6, 9, "ab")
    state.reset()
    assert state.state_dict(None)["batches"] == 0
