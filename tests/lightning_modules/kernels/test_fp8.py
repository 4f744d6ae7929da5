"""FP8 products: the arithmetic on a CPU, the hardware's on a GPU, and a decoder that computes with them."""

import pytest
import torch

from datamodules.errors import UserError
from lightning_modules.kernels.fp8 import Fp8Weight
from lightning_modules.models.fused_decoder import FusedDecoder, build_decoder
from tests.lightning_modules.models.test_fused_decoder import adapted, gradients, packed_rows


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def check_products(device, dtype, tokens, inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(tokens, inputs, generator=generator), torch.randn(tokens, outputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-3, 0, outputs)[:, None]
    x, grad, weight = (t.to(device, dtype) for t in (x, grad, weight))
    fp8 = Fp8Weight.of(weight)
    assert fp8.forward(x).dtype == dtype
    # e4m3 has 3 bits of mantissa: 2^-4 at most an entry, so some 3.7 % of a random product
    assert error(fp8.forward(x).cpu(), (x.double() @ weight.double().T).cpu()) < 0.05
    assert error(fp8.backward(grad).cpu(), (grad.double() @ weight.double()).cpu()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 16, 32), (7, 48, 112), (33, 80, 16)])
def test_products_on_a_cpu(tokens, inputs, outputs, dtype):
    check_products("cpu", dtype, tokens, inputs, outputs)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(1, 16, 32), (7, 48, 112), (33, 576, 1536), (4097, 4096, 6144)]
)
def test_products_on_a_gpu(tokens, inputs, outputs):
    check_products("cuda", torch.bfloat16, tokens, inputs, outputs)


def test_a_decoder_in_fp8_is_near_the_exact_one():
    model = adapted("mistral", intermediate_size=96)
    segments, positions = packed_rows()
    ids = torch.randint(0, 97, segments.shape)
    results = []
    for fp8 in (False, True):
        decoder = FusedDecoder(model, fp8=fp8)
        hidden = decoder.run(ids, positions, decoder.plan(segments)).view(*ids.shape, -1)
        results.append((hidden.detach(), gradients(model, hidden, segments)))
    (exact, exact_grads), (got, grads) = results
    assert 1e-4 < error(got, exact.double()) < 0.05
    for name, grad in grads.items():
        assert torch.cosine_similarity(grad.flatten(), exact_grads[name].flatten(), 0) > 0.98, name


def test_a_shape_that_fp8_does_not_multiply_is_refused():
    with pytest.raises(UserError, match=r"fp8=true: FP8 products want .* not \(48, 88\)"):
        build_decoder(adapted("mistral", intermediate_size=88), "auto", "none", torch.device("cpu"), fp8=True)


def test_eager_kernels_have_no_fp8():
    with pytest.raises(UserError, match="fp8=true: needs fused kernels"):
        build_decoder(adapted("mistral"), "eager", "none", torch.device("cpu"), fp8=True)
