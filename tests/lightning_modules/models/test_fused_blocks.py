"""The two autograd functions of a block against the same block in plain PyTorch, in value and gradients."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from lightning_modules.kernels.attention_plan import build_attention_plan
from lightning_modules.models.fused_blocks import (
    AttentionBlock,
    AttentionWeights,
    MLPBlock,
    MLPWeights,
    NormWeights,
)
from lightning_modules.models.fused_lora import FrozenWeight, Projection, ProjectionGroup
from tests.helpers.attention import dense_attention
from tests.helpers.packed_rows import two_rows

CHANNELS, INNER, HEADS, SHARED, WIDTH, RANK, EPS = 22, 35, 6, 2, 6, 3, 1e-5
SEGMENTS, POSITIONS = two_rows()
TOKENS = SEGMENTS.numel()
REAL = (SEGMENTS.reshape(-1) >= 0)[:, None]
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)]
SELECTED = torch.tensor([30, 2, 9, 17])


def projection(inputs, outputs, dtype, adapted=True):
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight = nn.Parameter((torch.randn(outputs, inputs) / inputs**0.5).to(dtype), requires_grad=False)
    if not adapted:
        return Projection(FrozenWeight(linear))
    a, b = (nn.Parameter(torch.randn(shape).to(dtype) / 4) for shape in ((RANK, inputs), (outputs, RANK)))
    return Projection(FrozenWeight(linear), a, b, 0.7)


def norm(dtype):
    return NormWeights((torch.rand(CHANNELS) + 0.5).to(dtype), EPS)


def attention_weights(dtype, adapted=(True, True, True, True)):
    sizes = (HEADS * WIDTH, SHARED * WIDTH, SHARED * WIDTH)
    qkv = [projection(CHANNELS, size, dtype, flag) for size, flag in zip(sizes, adapted, strict=False)]
    output = projection(HEADS * WIDTH, CHANNELS, dtype, adapted[3])
    heads = (HEADS, SHARED)
    return AttentionWeights(norm(dtype), ProjectionGroup(qkv), ProjectionGroup([output]), heads, WIDTH**-0.5)


def mlp_weights(dtype, adapted=(True, True, True)):
    gate_up = [projection(CHANNELS, INNER, dtype, flag) for flag in adapted[:2]]
    return MLPWeights(
        norm(dtype), ProjectionGroup(gate_up), ProjectionGroup([projection(INNER, CHANNELS, dtype, adapted[2])])
    )


def rotary(dtype):
    angles = POSITIONS.reshape(-1, 1) / 100.0 ** (torch.arange(WIDTH // 2) / (WIDTH // 2))
    return torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([angles.sin()] * 2, -1).to(dtype)


class Exact:
    """A block in float64: weights of the fused one, with leaves for the input and for every A and B."""

    def __init__(self, x, *groups):
        self.x = x.double().requires_grad_()
        self.leaves = [p if p is None else p.detach().double().requires_grad_() for g in groups for p in g.parameters()]

    def project(self, x, group, first):
        outputs = []
        for index, member in enumerate(group.members):
            a, b = self.leaves[first + 2 * index : first + 2 * index + 2]
            y = x @ member.weight.module.weight.double().T
            outputs.append(y if a is None else y + member.scale * (x @ a.T) @ b.T)
        return outputs

    def normed(self, weights):
        return self.x * torch.rsqrt(self.x.pow(2).mean(-1, keepdim=True) + EPS) * weights.weight_C.double()

    def attention(self, block):
        query, key, value = self.project(self.normed(block.norm), block.qkv, 0)
        cos, sin = (t.double()[:, None] for t in rotary(torch.float64))

        def rotate(heads):
            first, second = heads.chunk(2, -1)
            return heads * cos + torch.cat([-second, first], -1) * sin

        query, key, value = (t.unflatten(-1, (-1, WIDTH)) for t in (query, key, value))
        out = dense_attention(rotate(query), rotate(key), value, SEGMENTS, block.scale)
        (result,) = self.project(out.flatten(1), block.output, 6)
        return self.x + result

    def mlp(self, block):
        gate, up = self.project(self.normed(block.norm), block.gate_up, 0)
        (result,) = self.project(silu(gate) * up, block.down, 4)
        return self.x + result

    def gradients(self, output, grad):
        leaves = [self.x, *(leaf for leaf in self.leaves if leaf is not None)]
        return torch.autograd.grad((output * grad.double()).sum(), leaves)


def close(got, expected, tolerance):
    assert len(got) == len(expected)
    for actual, reference in zip(got, expected, strict=True):
        assert (actual.double() - reference).norm() <= tolerance * reference.norm()


def compare(output, x, parameters, exact, expected, tolerance, rows=None):
    """Compares value and gradients; padding has no gradient and no defined output."""
    keep = REAL if rows is None else REAL[rows]
    expected = expected if rows is None else expected[rows]
    assert output.dtype == x.dtype and output.shape == expected.shape
    close([output.detach() * keep], [expected.detach() * keep], tolerance)
    grad = torch.randn(output.shape).to(x.dtype) * keep
    trained = [p for p in parameters if p is not None]
    got = torch.autograd.grad(output, [x, *trained], grad)
    close(got, exact.gradients(expected, grad), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    "adapted", [(True,) * 4, (True, False, True, False), (False, False, False, True), (False,) * 4]
)
@pytest.mark.parametrize("rows", [None, SELECTED])
def test_attention_block_equals_plain_pytorch(dtype, tolerance, adapted, rows):
    block = attention_weights(dtype, adapted)
    parameters = block.qkv.parameters() + block.output.parameters()
    x = torch.randn(TOKENS, CHANNELS).to(dtype).requires_grad_()
    plan = build_attention_plan(SEGMENTS, HEADS // SHARED)
    exact = Exact(x.detach(), block.qkv, block.output)
    output = AttentionBlock.apply(x, block, *rotary(dtype), plan, rows, *parameters)
    compare(output, x, parameters, exact, exact.attention(block), tolerance, rows)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("adapted", [(True,) * 3, (True, False, True), (False, False, True), (False,) * 3])
@pytest.mark.parametrize(("keep", "chunk"), [(True, 2048), (False, 2048), (False, 7), (False, 1)])
def test_mlp_block_equals_plain_pytorch(dtype, tolerance, adapted, keep, chunk):
    block = mlp_weights(dtype, adapted)
    parameters = block.gate_up.parameters() + block.down.parameters()
    x = torch.randn(TOKENS, CHANNELS).to(dtype).requires_grad_()
    exact = Exact(x.detach(), block.gate_up, block.down)
    output = MLPBlock.apply(x, block, keep, chunk, *parameters)
    compare(output, x, parameters, exact, exact.mlp(block), tolerance)


@pytest.mark.parametrize("keep", [True, False])
def test_gradients_of_the_mlp_block_equal_finite_differences(keep):
    block = mlp_weights(torch.float64)
    parameters = block.gate_up.parameters() + block.down.parameters()
    x = torch.randn(5, CHANNELS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *p: MLPBlock.apply(x, block, keep, 2, *p), (x, *parameters), fast_mode=True, atol=1e-6, rtol=1e-4
    )


def test_gradients_of_the_attention_block_equal_finite_differences():
    block = attention_weights(torch.float64)
    parameters = block.qkv.parameters() + block.output.parameters()
    x = torch.randn(TOKENS, CHANNELS, dtype=torch.float64, requires_grad=True)
    plan, rows = build_attention_plan(SEGMENTS, HEADS // SHARED), torch.arange(17)  # without padding
    assert torch.autograd.gradcheck(
        lambda x, *p: AttentionBlock.apply(x, block, *rotary(torch.float64), plan, rows, *p), (x, *parameters),
        fast_mode=True, atol=1e-6, rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("keep", [True, False])
def test_an_input_without_gradient_gets_none(keep):
    block = mlp_weights(torch.float32)
    parameters = block.gate_up.parameters() + block.down.parameters()
    x = torch.randn(TOKENS, CHANNELS)
    with_input = x.clone().requires_grad_()
    MLPBlock.apply(with_input, block, keep, 7, *parameters).sum().backward()
    expected = [p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    MLPBlock.apply(x, block, keep, 7, *parameters).sum().backward()
    assert x.grad is None
    torch.testing.assert_close([p.grad for p in parameters], expected)


def test_queries_keys_and_values_are_views_of_one_buffer():
    block = attention_weights(torch.float32)
    buffer = torch.randn(5, (HEADS + 2 * SHARED) * WIDTH)
    parts = block.split(buffer)
    assert [tuple(part.shape) for part in parts] == [(5, HEADS, WIDTH), (5, SHARED, WIDTH), (5, SHARED, WIDTH)]
    assert all(part.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for part in parts)
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], -1), buffer)
