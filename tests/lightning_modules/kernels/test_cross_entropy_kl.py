"""Cross-entropy and KL, reference and kernel, against the losses of torch and autograd, at odd shapes."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lightning_modules.kernels.cross_entropy_kl import CrossEntropyKL, cross_entropy_kl
from lightning_modules.kernels.dispatch import reference_of

reference = reference_of(cross_entropy_kl)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel(*arguments):
    pytest.importorskip("triton")
    from lightning_modules.kernels import cross_entropy_kl_triton

    return cross_entropy_kl_triton.cross_entropy_kl(*arguments)


def case(tokens, width, teacher_width, scale=3.0):
    generator = torch.Generator().manual_seed(tokens + width)
    logits = scale * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    teacher = scale * torch.randn(tokens, teacher_width, generator=generator, dtype=torch.float64)
    labels = torch.randint(min(width, teacher_width), (tokens,), generator=generator)
    labels[::3] = -100
    if tokens > 1:
        labels[1] = logits[1].argmax()
    return logits.to(DEVICE), labels.to(DEVICE), teacher.to(DEVICE)


def expected(logits, labels, teacher, ce_weight, kl_weight, t):
    leaf = logits.clone().requires_grad_()
    ce = cross_entropy(leaf, labels, reduction="none", ignore_index=-100)
    kl = torch.zeros_like(ce)
    if teacher is not None:
        width = min(leaf.shape[1], teacher.shape[1])
        student, target = (log_softmax(x[:, :width] / t, -1) for x in (leaf, teacher))
        kl = kl_div(student, target, log_target=True, reduction="none").sum(-1) * (labels >= 0)
    correct = (leaf.argmax(-1) == labels).double()
    (gradient,) = torch.autograd.grad((ce_weight * ce + kl_weight * kl).sum(), leaf)
    return torch.stack([ce, kl, correct], 1).detach(), gradient


@pytest.mark.parametrize("function", [reference, kernel])
@pytest.mark.parametrize("t", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("widths", [(5, 5), (41, 38), (41, 44), (4099, 4090)])
def test_values_and_gradients_equal_autograd(function, widths, t):
    dtype, tolerance = (torch.float64, 1e-9) if function is reference else (torch.float32, 2e-5)
    logits, labels, teacher = case(7, *widths)
    for teacher_logits in (teacher, None):
        weights = (0.7, 0.3 * t * t, t)
        figures, gradient = expected(logits, labels, teacher_logits, *weights)
        rounded = None if teacher_logits is None else teacher_logits.to(dtype)
        got, got_gradient = function(logits.to(dtype), labels, rounded, *weights)
        torch.testing.assert_close(got.double(), figures, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got_gradient.double(), gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", [reference, kernel])
def test_extreme_logits_give_finite_losses_and_a_teacher_equal_to_the_student_gives_zero(function):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-80.0, 90.0, 88.0]], device=DEVICE)
    labels = torch.tensor([1, 2], device=DEVICE)
    for teacher in (logits.flip(1), logits):
        figures, gradient = function(logits, labels, teacher, 0.0, 4.0, 2.0)
        assert figures.isfinite().all()
        assert gradient.isfinite().all()
    assert figures[:, 1].abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("function", [reference, kernel])
def test_an_empty_batch_gives_empty_results(function):
    figures, gradient = function(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long), None, 1.0, 0.0, 1.0)
    assert (figures.shape, gradient.shape) == ((0, 3), (0, 9))


def test_the_function_sums_and_scales_its_gradient():
    logits, labels, teacher = case(7, 41, 41)
    leaf = logits.clone().requires_grad_()
    loss, correct, ce, kl = CrossEntropyKL.apply(leaf, labels, teacher, 0.5, 2.0, 2.0)
    figures, gradient = expected(logits, labels, teacher, 0.5, 2.0, 2.0)
    torch.testing.assert_close(torch.stack([ce, kl, correct]), figures.sum(0))
    torch.testing.assert_close(loss, 0.5 * ce + 2.0 * kl)
    assert not (correct.requires_grad or ce.requires_grad or kl.requires_grad)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, leaf)[0], 3 * gradient)
