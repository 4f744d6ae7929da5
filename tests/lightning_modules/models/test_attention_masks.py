"""Masks of packed rows against the batch contract's rule, pair by pair, in every form."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import LlamaConfig, LlamaForCausalLM

from datamodules.batch import Batch
from datamodules.errors import UserError
from lightning_modules.models.attention_masks import (
    _rule,
    attention_mask,
    attn_implementation,
    block_mask,
    register_attention,
    segment_mask,
)

SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, -1, -1], [1, 1, 1, 2, 3, 3, 3, 3, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 2, 3, 0, 0], [0, 1, 2, 0, 0, 1, 2, 3, 0]])


def pair_by_pair(segments, positions, window):
    """The contract's rule for one pair of query and key at a time."""
    mask = torch.zeros(len(segments), 1, segments.shape[1], segments.shape[1], dtype=torch.bool)
    for row, (segs, pos) in enumerate(zip(segments.tolist(), positions.tolist(), strict=True)):
        for q, own in enumerate(segs):
            for k in range(q + 1):
                allowed = segs[k] == own or (segs[k] == 0 and own > 0)
                mask[row, 0, q, k] = allowed and (window is None or pos[q] - pos[k] < window)
    return mask


@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_mask_follows_the_contract(window):
    assert torch.equal(segment_mask(SEGMENTS, POSITIONS, window), pair_by_pair(SEGMENTS, POSITIONS, window))


def test_every_query_has_a_key_also_in_padding():
    assert segment_mask(SEGMENTS, POSITIONS, 2).any(dim=-1).all()


@pytest.mark.parametrize("window", [None, 2])
def test_the_mask_of_flex_attention_is_the_same(window):
    rule = _rule(SEGMENTS, POSITIONS, window)
    full = create_mask(rule, 2, 1, 9, 9, device="cpu")
    assert torch.equal(full, pair_by_pair(SEGMENTS, POSITIONS, window))
    assert block_mask(SEGMENTS, POSITIONS, window).shape == (2, 1, 9, 9)


def test_forms_of_the_mask_of_each_implementation():
    batch = Batch(torch.zeros_like(SEGMENTS), POSITIONS, torch.zeros_like(SEGMENTS), SEGMENTS)
    expected = pair_by_pair(SEGMENTS, POSITIONS, None)
    assert torch.equal(attention_mask(batch, "sdpa", torch.float32), expected)
    eager = attention_mask(batch, "eager", torch.bfloat16)
    assert eager.dtype == torch.bfloat16
    assert torch.equal(eager == 0, expected)
    assert (eager[~expected] == torch.finfo(torch.bfloat16).min).all()
    with pytest.raises(ValueError, match="use sdpa, flex_attention, eager"):
        attention_mask(batch, "flash_attention_2", torch.float32)
    own = attention_mask(batch, "blockwise", torch.float32)
    assert own.dtype == torch.int64
    assert torch.equal(own[:, 0, 0], SEGMENTS) and torch.equal(own[:, 0, 1], POSITIONS)


def tiny_config(**options):
    return LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["sdpa", "eager", "blockwise"])
def test_the_implementation_of_a_model_is_the_one_that_was_set(name):
    register_attention(name)
    model = LlamaForCausalLM(tiny_config(attn_implementation=name))
    assert attn_implementation(model.config) == name
    model.set_attn_implementation("sdpa")
    assert attn_implementation(model.config) == "sdpa"
    assert attn_implementation(object()) == ""


def run_with(name, batch, **options):
    register_attention(name)
    model = LlamaForCausalLM(tiny_config(attn_implementation=name, **options)).train()
    mask = attention_mask(batch, name, torch.float32)
    return model.model(input_ids=batch.input_ids_BT, attention_mask=mask, use_cache=False)


def test_unsupported_settings_of_the_added_implementations_raise_errors():
    batch = Batch(torch.zeros_like(SEGMENTS), POSITIONS, torch.zeros_like(SEGMENTS), SEGMENTS)
    with pytest.raises(UserError, match="attn_implementation=blockwise: has no attention dropout"):
        run_with("blockwise", batch, attention_dropout=0.1)
    with pytest.raises(UserError, match="attn_implementation=pallas: its kernel needs a TPU"):
        run_with("pallas", batch)
