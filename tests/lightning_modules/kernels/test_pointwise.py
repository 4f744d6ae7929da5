"""The Triton kernels against plain torch: on a GPU as compiled, elsewhere in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from lightning_modules.kernels import pointwise, pointwise_triton

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
    close(pointwise_triton.rms_norm(x, weight, 1e-5), pointwise.rms_norm_reference(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
def test_rms_norm_backward_equals_autograd(dtype, with_residual):
    x, weight, grad = random(7, 88), random(88, seed=1), random(7, 88, seed=2)
    residual = random(7, 88, seed=3) if with_residual else None
    leaf = x.double().requires_grad_()
    pointwise.rms_norm_reference(leaf, weight.double(), 1e-5).backward(grad.double())
    expected = leaf.grad + (residual if with_residual else 0)
    arguments = [t if t is None else t.to(dtype) for t in (x, weight, grad, residual)]
    for function in (pointwise_triton.rms_norm_backward, pointwise.rms_norm_backward_reference):
        got = function(arguments[0], arguments[1], 1e-5, *arguments[2:])
        torch.testing.assert_close(got.double(), expected, rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6), (5, 88), (2, 2050)])
def test_swiglu(shape, dtype):
    gate_up = random(shape[0], 2 * shape[1], dtype=dtype)
    close(pointwise_triton.swiglu(gate_up), pointwise.swiglu_reference(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_backward_equals_autograd(dtype):
    gate_up, grad = random(5, 2 * 88), random(5, 88, seed=1)
    leaf = gate_up.double().requires_grad_()
    hidden = pointwise.swiglu_reference(leaf)
    hidden.backward(grad.double())
    for function in (pointwise_triton.swiglu_backward, pointwise.swiglu_backward_reference):
        got = function(gate_up.to(dtype), grad.to(dtype))
        for mine, expected in zip(got, (leaf.grad, hidden), strict=True):
            torch.testing.assert_close(mine.double(), expected.detach(), rtol=3e-2, atol=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "others", "width"), [(3, 2, 8), (5, 1, 16)])
def test_rotation_turns_the_first_heads_in_place_and_back(heads, others, width, dtype):
    y = random(6, (heads + others) * width, dtype=dtype)
    angles = torch.rand(6, width // 2, generator=torch.Generator().manual_seed(4)).to(DEVICE) * 7
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    got = pointwise_triton.rotate_(y.clone(), cos, sin, heads)
    close(got, pointwise.rotate_reference_(y.clone(), cos, sin, heads))
    assert torch.equal(got[:, heads * width :], y[:, heads * width :])
    half = width // 2
    pairs = torch.complex(y[:, : heads * width].float().view(6, heads, 2, half)[:, :, 0],
                          y[:, : heads * width].float().view(6, heads, 2, half)[:, :, 1])  # fmt: skip
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    close(got[:, : heads * width], torch.stack([turned.real, turned.imag], 2).flatten(1).to(dtype))
    torch.testing.assert_close(pointwise_triton.rotate_(got, cos, sin, heads, True), y, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_rows_use_the_whole_range(dtype):
    x = random(5, 40, dtype=dtype) * torch.tensor([1e-3, 1, 50, 0, 1], device=DEVICE, dtype=dtype)[:, None]
    numbers, scale = pointwise_triton.quantize_rows(x)
    expected, expected_scale = pointwise.quantize_rows_reference(x)
    torch.testing.assert_close(scale, expected_scale)
    wrong = (numbers.float() - expected.float()).abs() > 0.13 * expected.float().abs()
    assert wrong.float().mean() <= (0 if DEVICE == "cuda" else 0.03)  # the interpreter rounds 127.9 to 64, not to 128
    restored = numbers.float() * scale
    assert ((restored - x.float()).abs() <= 2**-4 * x.float().abs() + 2**-9 * scale)[~wrong].all()
    assert (numbers.float().abs().amax(-1)[[0, 1, 2, 4]] == 448).all()
