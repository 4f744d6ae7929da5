"""The references of the pointwise operations against autograd, complex rotation and transformers, at odd shapes."""

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_modules.kernels import pointwise

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got, expected, factor=1):
    tolerance = factor * TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 47), (3, 200)])
def test_rms_norm_equals_that_of_transformers(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    module = LlamaRMSNorm(shape[1], eps=1e-5).to(dtype)
    module.weight.data = weight
    got = pointwise.rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    assert torch.equal(got, module(x))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("with_residual", [True, False])
def test_rms_norm_backward_equals_autograd(dtype, with_residual):
    x, weight, grad, residual = (
        t.to(dtype) for t in (random(7, 89), random(89, seed=1), random(7, 89, seed=2), random(7, 89, seed=3))
    )
    leaf = x.double().requires_grad_()
    normed = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    normed.backward(grad.double())
    expected = leaf.grad + (residual.double() if with_residual else 0)
    close(pointwise.rms_norm_backward(x, weight, 1e-5, grad, residual if with_residual else None), expected, 3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3), (5, 89)])
def test_swiglu_and_its_backward_pass_equal_autograd(shape, dtype):
    rows, inner = shape
    gate_up, grad = random(rows, 2 * inner, dtype=dtype), random(rows, inner, dtype=dtype, seed=1)
    leaf = gate_up.double().requires_grad_()
    hidden = silu(leaf[:, :inner]) * leaf[:, inner:]
    hidden.backward(grad.double())
    close(pointwise.swiglu(gate_up), hidden.detach(), 3)
    grad_gate_up, recomputed = pointwise.swiglu_backward(gate_up, grad)
    close(grad_gate_up, leaf.grad, 3)
    close(recomputed, hidden.detach(), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "others", "width"), [(3, 2, 8), (5, 1, 16)])
def test_rotation_equals_a_complex_product_and_can_be_reversed(heads, others, width, dtype):
    y, half = random(6, (heads + others) * width, dtype=dtype), width // 2
    angles = torch.rand(6, half, generator=torch.Generator().manual_seed(4)) * 7
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    got = pointwise.rotate_(y.clone(), cos, sin, heads)
    assert torch.equal(got[:, heads * width :], y[:, heads * width :])
    first, second = y[:, : heads * width].float().view(6, heads, 2, half).unbind(2)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    close(got[:, : heads * width], torch.stack([turned.real, turned.imag], 2).flatten(1), 3)
    restored = pointwise.rotate_(got, cos, sin, heads, True)
    torch.testing.assert_close(restored, y, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_rows_use_the_whole_range_of_e4m3(dtype):
    x = random(5, 41, dtype=dtype) * torch.tensor([1e-3, 1, 50, 0, 1], dtype=dtype)[:, None]
    numbers, scale = pointwise.quantize_rows(x)
    assert numbers.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert scale.shape == (5, 1)
    # 3 bits of mantissa: an error of at most 2^-4 of a number, and half a step of 2^-9 near zero
    assert ((numbers.float() * scale - x.float()).abs() <= 2**-4 * x.float().abs() + 2**-10 * scale).all()
    assert (numbers.float().abs().amax(-1)[[0, 1, 2, 4]] == 448).all()
    assert not numbers[3].float().any()
