"""The pointwise Triton kernels against their references: compiled on a GPU, in Triton's interpreter without one."""

import pytest
import torch

pytest.importorskip("triton")

from lightning_modules.kernels import pointwise, pointwise_triton
from lightning_modules.kernels.dispatch import reference_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 48), (3, 200)])
def test_rms_norm(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    close(pointwise_triton.rms_norm(x, weight, 1e-5), reference_of(pointwise.rms_norm)(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
def test_rms_norm_backward_equals_autograd(dtype, with_residual):
    x, weight, grad = random(7, 88), random(88, seed=1), random(7, 88, seed=2)
    residual = random(7, 88, seed=3) if with_residual else None
    leaf = x.double().requires_grad_()
    reference_of(pointwise.rms_norm)(leaf, weight.double(), 1e-5).backward(grad.double())
    expected = leaf.grad + (residual if with_residual else 0)
    arguments = [t if t is None else t.to(dtype) for t in (x, weight, grad, residual)]
    got = pointwise_triton.rms_norm_backward(arguments[0], arguments[1], 1e-5, *arguments[2:])
    torch.testing.assert_close(got.double(), expected, rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6), (5, 88), (2, 2050)])
def test_swiglu(shape, dtype):
    gate_up = random(shape[0], 2 * shape[1], dtype=dtype)
    close(pointwise_triton.swiglu(gate_up), reference_of(pointwise.swiglu)(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_backward_equals_autograd(dtype):
    gate_up, grad = random(5, 2 * 88), random(5, 88, seed=1)
    leaf = gate_up.double().requires_grad_()
    hidden = reference_of(pointwise.swiglu)(leaf)
    hidden.backward(grad.double())
    gradients = pointwise_triton.swiglu_backward(gate_up.to(dtype), grad.to(dtype))
    for got, expected in zip(gradients, (leaf.grad, hidden), strict=True):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=3e-2, atol=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "others", "width"), [(3, 2, 8), (5, 1, 16)])
def test_rotation_of_the_first_heads_equals_the_reference_and_can_be_reversed(heads, others, width, dtype):
    y = random(6, (heads + others) * width, dtype=dtype)
    angles = torch.rand(6, width // 2, generator=torch.Generator().manual_seed(4)).to(DEVICE) * 7
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    got = pointwise_triton.rotate_(y.clone(), cos, sin, heads)
    close(got, reference_of(pointwise.rotate_)(y.clone(), cos, sin, heads))
    assert torch.equal(got[:, heads * width :], y[:, heads * width :])
    torch.testing.assert_close(pointwise_triton.rotate_(got, cos, sin, heads, True), y, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_rows_use_the_whole_range(dtype):
    x = random(5, 40, dtype=dtype) * torch.tensor([1e-3, 1, 50, 0, 1], device=DEVICE, dtype=dtype)[:, None]
    numbers, scale = pointwise_triton.quantize_rows(x)
    expected, expected_scale = reference_of(pointwise.quantize_rows)(x)
    torch.testing.assert_close(scale, expected_scale)
    wrong = (numbers.float() - expected.float()).abs() > 0.13 * expected.float().abs()
    assert wrong.float().mean() <= (0 if DEVICE == "cuda" else 0.03)  # the interpreter rounds 127.9 to 64, not to 128
    restored = numbers.float() * scale
    assert ((restored - x.float()).abs() <= 2**-4 * x.float().abs() + 2**-9 * scale)[~wrong].all()
    assert (numbers.float().abs().amax(-1)[[0, 1, 2, 4]] == 448).all()
