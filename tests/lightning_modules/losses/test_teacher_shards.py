"""Shards on disk: the tensors are read as they were written, and damage is noticed."""

import itertools

import numpy as np
import pytest
import torch

from datamodules.errors import UserError
from lightning_modules.losses.teacher_cache import CachedTeacher, TeacherCache, digest
from lightning_modules.losses.teacher_shards import BrokenShard, Shard, id_type, position_bytes, save_shard, summarize
from tests.helpers.teacher_cache_data import EXAMPLES, KEY, RECORD, V, arrays_of, example, write_cache


@pytest.fixture
def folder(tmp_path):
    return write_cache(tmp_path)


def test_an_example_is_read_as_it_was_written(folder):
    shard, arrays = Shard(folder / "train-00001.safetensors", digest(RECORD)), arrays_of(EXAMPLES[5:])
    assert np.array_equal(shard.keys, arrays["keys"])
    starts = [0, *arrays["ends"]]
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        for part, name in zip(shard.read(index), ("ids", "log_probs", "tails"), strict=True):
            assert np.array_equal(part, arrays[name][start:end])


def test_writing_leaves_no_temporary_file(folder):
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]


@pytest.mark.parametrize(("vocabulary", "expected"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_the_type_of_ids_holds_the_vocabulary(vocabulary, expected):
    assert id_type(vocabulary) is expected
    assert np.iinfo(expected).max >= vocabulary - 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kept_tokens_and_tail_are_the_softmax_of_the_teacher(temperature):
    logits = torch.randn(5, V, dtype=torch.float64)
    ids, log_probs, tails = summarize(logits, 6, [temperature])
    softmax = logits.softmax(-1)
    assert torch.equal(ids, softmax.topk(6).indices)
    torch.testing.assert_close(log_probs.exp(), softmax.gather(1, ids))
    rest = softmax.scatter(1, ids, 0.0).pow(1 / temperature).sum(-1)  # 0 ** (1 / T) is 0
    torch.testing.assert_close(tails[:, 0].exp(), rest)


def test_a_run_refuses_a_broken_shard_with_the_fix(folder):
    (folder / "train-00001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00001\.safetensors can't be read.*Fix: run cache-teacher again"):
        CachedTeacher(TeacherCache(str(folder), top_k=4), KEY, 2.0)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.999])
def test_a_truncated_or_missing_shard_is_refused(folder, fraction):
    file = folder / "train-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(BrokenShard, match=r"train-00001\.safetensors can't be read"):
        Shard(file, digest(RECORD))
    file.unlink()
    with pytest.raises(BrokenShard, match=r"train-00001\.safetensors can't be read"):
        Shard(file, digest(RECORD))


def test_a_changed_shard_is_not_intact_and_one_of_another_cache_is_refused(folder):
    file = folder / "train-00000.safetensors"
    assert Shard(file, digest(RECORD)).is_intact()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert not Shard(file, digest(RECORD)).is_intact()
    with pytest.raises(BrokenShard, match="another cache"):
        Shard(file, digest(KEY))


def test_bytes_per_position(tmp_path):
    examples, sizes = [example(1, 5, 1000), example(2, 5, 3000)], []
    for number, part in enumerate((examples[:1], examples[1:])):
        save_shard(tmp_path / f"{number}.safetensors", arrays_of(part, k=8), "")
        sizes.append((tmp_path / f"{number}.safetensors").stat().st_size)
    assert position_bytes(8, 2, V) == pytest.approx((sizes[1] - sizes[0]) / 2000, abs=0.1)
    assert position_bytes(32, 1, 128_000) == 32 * 6 + 2
