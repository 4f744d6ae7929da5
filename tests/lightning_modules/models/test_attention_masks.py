import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from datamodules.batch import Batch
from lightning_modules.models.attention_masks import _rule, attention_mask, block_mask, segment_mask

SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, -1, -1], [1, 1, 1, 2, 3, 3, 3, 3, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 2, 3, 0, 0], [0, 1, 2, 0, 0, 1, 2, 3, 0]])


def by_hand(segments, positions, window):
    """The contract's rule, a pair at a time."""
    mask = torch.zeros(len(segments), 1, segments.shape[1], segments.shape[1], dtype=torch.bool)
    for row, (segs, pos) in enumerate(zip(segments.tolist(), positions.tolist(), strict=True)):
        for q, own in enumerate(segs):
            for k in range(q + 1):
                seen = segs[k] == own or (segs[k] == 0 and own > 0)
                mask[row, 0, q, k] = seen and (window is None or pos[q] - pos[k] < window)
    return mask


@pytest.mark.parametrize("window", [None, 1, 3])
def test_mask_follows_the_contract(window):
    assert torch.equal(segment_mask(SEGMENTS, POSITIONS, window), by_hand(SEGMENTS, POSITIONS, window))


def test_every_query_has_a_key_padding_too():
    assert segment_mask(SEGMENTS, POSITIONS, 2).any(dim=-1).all()


@pytest.mark.parametrize("window", [None, 2])
def test_flex_attention_has_the_same_rule(window):
    rule = _rule(SEGMENTS, POSITIONS, window)
    full = create_mask(rule, 2, 1, 9, 9, device="cpu")
    assert torch.equal(full, by_hand(SEGMENTS, POSITIONS, window))
    assert block_mask(SEGMENTS, POSITIONS, window).shape == (2, 1, 9, 9)


def test_forms_of_the_mask():
    batch = Batch(torch.zeros_like(SEGMENTS), POSITIONS, torch.zeros_like(SEGMENTS), SEGMENTS)
    expected = by_hand(SEGMENTS, POSITIONS, None)
    assert torch.equal(attention_mask(batch, "sdpa", torch.float32), expected)
    eager = attention_mask(batch, "eager", torch.bfloat16)
    assert eager.dtype == torch.bfloat16
    assert torch.equal(eager == 0, expected)
    assert (eager[~expected] == torch.finfo(torch.bfloat16).min).all()
    with pytest.raises(ValueError, match="use sdpa, flex_attention, eager"):
        attention_mask(batch, "flash_attention_2", torch.float32)
