"""Layouts of tensors on a mesh; no device is needed."""

import pytest

from lightning_modules.strategies.xla.sharding import row_spec, weight_spec


@pytest.mark.parametrize(
    ("shape", "devices", "expected"),
    [
        ((14336, 4096), 8, ("fsdp", None)),
        ((4096, 14336), 8, (None, "fsdp")),
        ((4096, 4096), 8, ("fsdp", None)),
        ((262, 64), 4, (None, "fsdp")),  # 4 devices do not divide the larger one
        ((4096,), 8, ("fsdp",)),
        ((3, 5), 8, (None, None)),
        ((), 8, ()),
        ((0, 8), 8, (None, "fsdp")),
    ],
)
def test_the_largest_divisible_dimension_is_sharded(shape, devices, expected):
    assert weight_spec(shape, devices) == expected


def test_rows_are_sharded_over_all_devices():
    assert row_spec(2) == (("data", "fsdp"), None)
