"""Blockwise attention against scaled dot-product attention with a dense mask, and in a model."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from datamodules.batch import Batch
from lightning_modules.kernels.blockwise_attention import blockwise_attention
from lightning_modules.models.attention_masks import attention_mask, segment_mask
from lightning_modules.models.backbone import Backbone

SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, -1, -1], [1, 1, 1, 2, 3, 3, 3, 3, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 2, 3, 0, 0], [0, 1, 2, 0, 0, 1, 2, 3, 0]])


def inputs(dtype, heads=6, key_heads=2, channels=5):
    shapes = [(2, heads, 9, channels), (2, key_heads, 9, channels), (2, key_heads, 9, channels)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def reference(query, key, value, window):
    """Attention with the dense mask, by PyTorch."""
    mask = segment_mask(SEGMENTS, POSITIONS, window)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("block", [1, 2, 4, 9, 64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_output_and_gradients_equal_those_with_a_dense_mask(dtype, tolerance, block, window):
    tensors = inputs(dtype)
    output = blockwise_attention(*tensors, SEGMENTS, POSITIONS, 0.3, window, block)
    expected = reference(*tensors, window)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn_like(output)
    got = torch.autograd.grad((output * weights).sum(), tensors)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), tensors)
    torch.testing.assert_close(got, expected_gradients, atol=tolerance, rtol=tolerance)


def test_gradients_equal_finite_differences():
    tensors = inputs(torch.float64, heads=2, key_heads=1, channels=3)
    torch.autograd.gradcheck(
        lambda *x: blockwise_attention(*x, SEGMENTS, POSITIONS, 0.3, None, 4), tensors, atol=1e-8, rtol=1e-6
    )


def test_autocast_does_not_round_the_scores():
    tensors = inputs(torch.float32)
    plain = blockwise_attention(*tensors, SEGMENTS, POSITIONS, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blockwise_attention(*tensors, SEGMENTS, POSITIONS, 0.3), plain)


def test_a_model_has_the_hidden_states_and_the_generated_tokens_of_sdpa(tiny_mistral):
    ids = torch.randint(5, 200, SEGMENTS.shape)
    batch = Batch(ids, POSITIONS, torch.full_like(ids, -100), SEGMENTS)
    hidden, generated = {}, {}
    for attention in ("sdpa", "blockwise"):
        model = Backbone(str(tiny_mistral), attn_implementation=attention).build()
        mask = attention_mask(batch, attention, torch.float32)
        output = model.model(input_ids=ids, position_ids=POSITIONS, attention_mask=mask, use_cache=False)
        hidden[attention] = output.last_hidden_state
        generated[attention] = model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(hidden["blockwise"], hidden["sdpa"], atol=1e-5, rtol=1e-5)
    assert torch.equal(generated["blockwise"], generated["sdpa"])
