"""The batch contract: copies, and the fields that they leave unchanged."""

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision

from datamodules.batch import Batch


@dataclass
class Plan:
    """A plan that records the devices it was copied to."""

    devices: tuple = ()

    def to(self, device, non_blocking):
        return Plan((*self.devices, str(device)))


def make_batch(**fields):
    ids, positions, labels, segments = (torch.full((2, 3), value) for value in range(4))
    return Batch(ids, positions, labels, segments, findings=5, supervised=4, padding=1, cursor="cursor", **fields)


def test_every_tensor_is_mapped_and_the_counts_are_kept():
    batch = make_batch(extras={"teacher_tail": torch.tensor([10.0])}, plan=Plan())
    mapped = batch.map_tensors(lambda tensor: tensor + 1)
    names = ("input_ids_BT", "position_ids_BT", "labels_BT", "segment_ids_BT")
    assert [int(getattr(mapped, name)[0, 0]) for name in names] == [1, 2, 3, 4]
    assert mapped.extras == {"teacher_tail": torch.tensor([11.0])}
    assert (mapped.findings, mapped.supervised, mapped.padding, mapped.cursor) == (5, 4, 1, "cursor")
    assert mapped.plan is batch.plan
    assert [int(getattr(batch, name)[0, 0]) for name in names] == [0, 1, 2, 3], "the batch itself was changed"


def test_a_batch_without_extras_has_none_after_a_copy():
    assert make_batch().map_tensors(torch.clone).extras is None
    assert make_batch().to("cpu").plan is None


def test_a_copy_to_a_device_copies_tensors_extras_and_plan():
    moved = make_batch(extras={"a": torch.zeros(1)}, plan=Plan()).to("meta")
    assert all(getattr(moved, name).is_meta for name in ("input_ids_BT", "labels_BT", "segment_ids_BT"))
    assert moved.extras["a"].is_meta
    assert moved.plan.devices == ("meta",)


@pytest.mark.gpu
def test_pinned_memory():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pinned = make_batch(extras={"a": torch.zeros(1)}).pin_memory()
    assert pinned.labels_BT.is_pinned()
    assert pinned.extras["a"].is_pinned()


def test_the_plugins_of_other_modules_can_convert_a_batch():
    """Lightning sets each field of a copy, which a frozen dataclass would refuse."""
    batch = make_batch(extras={"a": torch.zeros(1)})
    converted = HalfPrecision("bf16-true").convert_input(batch)
    assert converted.extras["a"].dtype == torch.bfloat16
    assert converted.labels_BT.dtype == torch.int64
    assert batch.extras["a"].dtype == torch.float32
