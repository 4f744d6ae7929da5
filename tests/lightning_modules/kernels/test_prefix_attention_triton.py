"""The Triton kernels of attention over packed rows against a dense mask, in Triton's interpreter and on a GPU."""

import pytest
import torch

from tests.helpers.attention import check_attention
from tests.helpers.packed_rows import LAYOUTS

pytest.importorskip("triton")

from lightning_modules.kernels.prefix_attention_triton import attend, attend_backward

KERNELS = (attend, attend_backward)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, the tests marked gpu run the kernels")


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (3, 1), (2, 2)])
def test_interpreted_kernels_equal_the_dense_mask(layout, heads, shared):
    check_attention(KERNELS, layout, (heads, shared, 16), "cpu", torch.float32, 1e-5)


@interpreted
def test_a_strided_gradient_of_the_output_gives_the_same_gradients():
    check_attention(KERNELS, "prefix", (4, 2, 16), "cpu", torch.float32, 1e-5, strided_gradient=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "shared", "width"), [(8, 2, 128), (9, 3, 64), (4, 4, 128), (16, 1, 64)])
def test_compiled_kernels_equal_the_dense_mask(layout, heads, shared, width, dtype):
    check_attention(KERNELS, layout, (heads, shared, width), "cuda", dtype, 1e-2)
