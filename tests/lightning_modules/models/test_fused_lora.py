"""Groups of projections against plain PyTorch and PEFT's formula, y = x W^T + scale x A^T B^T, at odd shapes."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_modules.models.fused_lora import FrozenWeight, Projection, ProjectionGroup

TOKENS, CHANNELS = 13, 27
#: adapted members of a group of three, as (outputs, rank or None)
GROUPS = {
    "all adapted": [(31, 5), (9, 5), (9, 5)],
    "ranks differ": [(31, 3), (9, 7), (1, 1)],
    "some adapted": [(31, None), (9, 4), (9, None)],
    "none adapted": [(31, None), (9, None)],
    "one projection": [(17, 6)],
    "one frozen projection": [(17, None)],
}
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def layers(members, dtype, adapter_dtype=None, alpha=11):
    """PEFT's layers around linear modules, with nonzero B."""
    modules = nn.ModuleDict(
        {f"p{i}": nn.Linear(CHANNELS, outputs, bias=False) for i, (outputs, _) in enumerate(members)}
    )
    modules = modules.to(dtype).requires_grad_(False)
    ranks = {f"p{i}": rank for i, (_, rank) in enumerate(members) if rank}
    if ranks:
        config = LoraConfig(r=1, rank_pattern=ranks, lora_alpha=alpha, target_modules=list(ranks))
        inject_adapter_in_model(config, modules)
    for name, parameter in modules.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape).to(adapter_dtype or dtype)
    return [modules[f"p{i}"] for i in range(len(members))]


def exact_outputs(modules, x):
    """Outputs of all layers, concatenated, by PEFT's formula in float64; A and B are leaves."""
    outputs, leaves = [], []
    for module in modules:
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        y = x @ base.weight.double().T
        if hasattr(module, "lora_A"):
            a, b = (
                part["default"].weight.detach().double().requires_grad_() for part in (module.lora_A, module.lora_B)
            )
            y = y + module.scaling["default"] * (x @ a.T) @ b.T
            leaves += [a, b]
        else:
            leaves += [None, None]
        outputs.append(y)
    return torch.cat(outputs, -1), leaves


def detached(group):
    """A and B of a group, as an autograd function sees them: without a graph."""
    return [p if p is None else p.detach() for p in group.parameters()]


def distance(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", GROUPS)
def test_outputs_and_gradients_equal_autograd_of_the_formula(name, dtype, tolerance):
    modules = layers(GROUPS[name], dtype)
    group = ProjectionGroup([Projection.of(module) for module in modules])
    parameters = detached(group)
    x = torch.randn(TOKENS, CHANNELS).to(dtype)
    leaf = x.double().requires_grad_()
    expected, leaves = exact_outputs(modules, leaf)
    y, xa = group.forward(x, parameters)
    assert y.dtype == dtype
    assert distance(y, expected.detach()) < tolerance
    grad = torch.randn(expected.shape).to(dtype)
    trained = [tensor for tensor in leaves if tensor is not None]
    grad_x, *grads = torch.autograd.grad((expected * grad).sum(), [leaf, *trained])
    got_x, ga = group.input_gradient(grad, parameters)
    assert distance(got_x, grad_x) < tolerance
    got = group.parameter_gradients(grad, ga, x, xa, parameters)
    assert [g is None for g in got] == [tensor is None for tensor in leaves]
    for actual, reference in zip([g for g in got if g is not None], grads, strict=True):
        assert distance(actual, reference) < tolerance
    assert (xa is None) == (ga is None) == (not trained)


@pytest.mark.parametrize("name", GROUPS)
def test_equals_the_modules_of_peft(name):
    modules = layers(GROUPS[name], torch.float32)
    group = ProjectionGroup([Projection.of(module) for module in modules])
    x = torch.randn(TOKENS, CHANNELS)
    expected = torch.cat([module(x) for module in modules], -1)
    torch.testing.assert_close(group.forward(x, group.parameters())[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GROUPS)
def test_a_residual_is_added_and_not_changed(name):
    modules = layers(GROUPS[name], torch.float64)
    group = ProjectionGroup([Projection.of(module) for module in modules])
    x, parameters = torch.randn(TOKENS, CHANNELS, dtype=torch.float64), detached(group)
    plain, _ = group.forward(x, parameters)
    residual = torch.randn_like(plain)
    before = residual.clone()
    got, _ = group.forward(x, parameters, residual)
    torch.testing.assert_close(got, plain + residual)
    assert torch.equal(residual, before)


def test_a_missing_product_with_a_is_recomputed():
    modules = layers(GROUPS["ranks differ"], torch.float64)
    group = ProjectionGroup([Projection.of(module) for module in modules])
    x, parameters = torch.randn(TOKENS, CHANNELS, dtype=torch.float64), detached(group)
    y, xa = group.forward(x, parameters)
    grad = torch.randn_like(y)
    _, ga = group.input_gradient(grad, parameters)
    kept = group.parameter_gradients(grad, ga, x, xa, parameters)
    recomputed = group.parameter_gradients(grad, ga, x, None, parameters)
    torch.testing.assert_close(recomputed, kept)


def test_the_gradient_of_the_input_is_not_computed_unless_needed():
    modules = layers(GROUPS["some adapted"], torch.float32)
    group = ProjectionGroup([Projection.of(module) for module in modules])
    grad = torch.randn(TOKENS, sum(group.sizes))
    got, ga = group.input_gradient(grad, detached(group), need_input=False)
    expected_x, expected = group.input_gradient(grad, detached(group))
    assert got is None and expected_x is not None
    assert torch.equal(ga, expected)


def test_float32_adapters_of_a_bfloat16_base_get_float32_gradients():
    modules = layers(GROUPS["all adapted"], torch.bfloat16, torch.float32)
    group = ProjectionGroup([Projection.of(module) for module in modules])
    x, parameters = torch.randn(TOKENS, CHANNELS).bfloat16(), detached(group)
    y, xa = group.forward(x, parameters)
    grad = torch.randn_like(y)
    _, ga = group.input_gradient(grad, parameters)
    gradients = group.parameter_gradients(grad, ga, x, xa, parameters)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("fp8", [False, True])
def test_without_adapter_only_the_frozen_weights_remain(fp8):
    modules = layers([(32, 5), (16, 5)], torch.float32)
    for module in modules:
        module.get_base_layer().weight = nn.Parameter(torch.randn(module.out_features, 32), requires_grad=False)
    group = ProjectionGroup([Projection(Projection.of(module).weight) for module in modules])
    full = ProjectionGroup([Projection.of(module) for module in modules])
    if fp8:
        full.to_fp8(torch.float32)
    base = full.without_adapter()
    assert base.parameters() == [None] * 4
    assert base.fp8 is full.fp8
    x = torch.randn(TOKENS, 32)
    got, xa = base.forward(x, base.parameters())
    expected, _ = group.forward(x, group.parameters())
    assert xa is None
    assert distance(got, expected.double()) < (0.05 if fp8 else 1e-6)


def test_a_single_dense_weight_is_not_copied():
    (module,) = layers([(17, None)], torch.float32)
    group = ProjectionGroup([Projection.of(module)])
    assert group.weight_OC(torch.empty(0)) is module.weight
    assert group.weight_OC(torch.empty(0, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("undo_nesting", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(48, 64), (33, 128)])
def test_an_nf4_weight_is_read_as_bitsandbytes_dequantizes_it(shape, nested, undo_nesting):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    outputs, inputs = shape
    module = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compress_statistics=nested)
    module.weight = bitsandbytes.nn.Params4bit(
        torch.randn(outputs, inputs), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    module = module.to("cpu")
    assert module.weight.quant_state.nested == nested
    expected = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    weight = FrozenWeight(module, undo_nesting)
    assert weight.shape == (outputs, inputs)
    out = torch.full((outputs + 2, inputs), float("nan"))[1:-1]  # rows of a wider buffer
    weight.read(out)
    torch.testing.assert_close(out, expected.float(), rtol=1e-6, atol=1e-6)
