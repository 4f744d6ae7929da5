"""The reference of attention over packed rows against a dense mask, in value and gradients."""

import pytest
import torch

from lightning_modules.kernels.dispatch import reference_of
from lightning_modules.kernels.prefix_attention import attend, attend_backward
from tests.helpers.attention import check_attention
from tests.helpers.packed_rows import LAYOUTS

REFERENCE = (reference_of(attend), reference_of(attend_backward))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 10), (6, 2, 10), (3, 1, 7)])
def test_equals_the_dense_mask_in_value_and_gradients(layout, heads, shared, width):
    check_attention(REFERENCE, layout, (heads, shared, width), "cpu", torch.float64, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_computes_in_float32_or_wider(dtype, tolerance):
    check_attention(REFERENCE, "prefix", (6, 2, 10), "cpu", dtype, tolerance)
