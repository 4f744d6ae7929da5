"""FP8 products on a CPU and on a GPU, and a decoder that computes with them."""

import pytest
import torch

from datamodules.errors import UserError
from lightning_modules.kernels.fp8 import Fp8Weight
from lightning_modules.models.fused_decoder import FusedDecoder, build_decoder
from tests.helpers.fused_models import VOCABULARY, adapted, gradients
from tests.helpers.packed_rows import two_rows


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def check_products(device, dtype, tokens, inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(tokens, inputs, generator=generator), torch.randn(tokens, outputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-3, 0, outputs)[:, None]
    x, grad, weight = (t.to(device, dtype) for t in (x, grad, weight))
    fp8 = Fp8Weight.of(weight)
    assert fp8.forward(x).dtype == dtype
    # e4m3 has 3 bits of mantissa: an error of at most 2^-4 per entry, about 3.7 % of a random product
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


def test_a_decoder_in_fp8_is_close_to_the_exact_one():
    model = adapted("mistral", base_options={"intermediate_size": 96})
    segments, positions = two_rows()
    ids = torch.randint(0, VOCABULARY, segments.shape)
    results = []
    for fp8 in (False, True):
        decoder = FusedDecoder(model, fp8=fp8)
        hidden = decoder.run(ids, positions, decoder.plan(segments)).view(*ids.shape, -1)
        results.append((hidden.detach(), gradients(model, hidden, segments)))
    (exact, exact_grads), (got, grads) = results
    assert 1e-4 < error(got, exact.double()) < 0.05
    for name, grad in grads.items():
        assert torch.cosine_similarity(grad.flatten(), exact_grads[name].flatten(), 0) > 0.98, name


def test_a_size_that_is_not_a_multiple_of_16_raises_an_error():
    with pytest.raises(UserError, match=r"fp8=true: FP8 products need .* not \(48, 88\)"):
        build_decoder(adapted("mistral"), "auto", "none", torch.device("cpu"), fp8=True)


def test_eager_kernels_do_not_support_fp8():
    with pytest.raises(UserError, match="fp8=true: needs fused kernels"):
        build_decoder(adapted("mistral"), "eager", "none", torch.device("cpu"), fp8=True)
