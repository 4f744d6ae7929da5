"""The prefix cache against a forward pass over whole prompts, and its helpers by hand."""

from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from datamodules.errors import UserError
from lightning_modules.generation.prefix_cache import (
    PrefixCache,
    StaticCacheLayer,
    batches_by_length,
    common_prefix,
    eval_mode,
    max_positions,
    truncate_prompts,
)
from tests.helpers.byte_chat import TASK, Bytes, load

PROMPTS = [[1, 20, 21, 30, 31, 32, 33], [1, 20, 21, 40], [1, 20, 21, 50, 51]]


def test_a_static_layer_equals_a_growing_one():
    keys, values = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    static, growing = StaticCacheLayer(keys, values, 5, 9), DynamicLayer()
    growing.update(keys.expand(5, -1, -1, -1), values.expand(5, -1, -1, -1))
    for width in (2, 1, 3):
        new = torch.randn(5, 2, width, 4), torch.randn(5, 2, width, 4)
        torch.testing.assert_close(static.update(*new), growing.update(*new), rtol=0, atol=0)
        assert static.get_seq_length() == growing.get_seq_length()
    indices = torch.tensor([4, 4, 0])
    static.batch_select_indices(indices)
    growing.batch_select_indices(indices)
    torch.testing.assert_close(static._keys, growing.keys, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", [3, 0])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_a_forward_pass_over_whole_prompts(tiny_mistral, prefix, attention):
    model = load(tiny_mistral)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        cache = PrefixCache(model, PROMPTS[0][:prefix])
        ids_BS, mask_BL, position_BS, rows = cache.prepare_batch(PROMPTS, new_tokens=1)
        assert (ids_BS.shape, mask_BL.shape) == ((3, 7 - prefix), (3, 7))
        logits = cache.logits(ids_BS, mask_BL, position_BS, rows, keep=1)
        for row, prompt in zip(logits, PROMPTS, strict=True):
            torch.testing.assert_close(row[0], model(torch.tensor([prompt])).logits[0, -1])
        new = torch.tensor([[7], [8], [9]])  # a second pass continues in the same cache
        mask = torch.nn.functional.pad(mask_BL, (0, 1), value=1)
        again = cache.logits(new, mask, position_BS[:, -1:] + 1, rows)
        for row, prompt, token in zip(again, PROMPTS, new, strict=True):
            expected = model(torch.tensor([[*prompt, *token.tolist()]])).logits[0, -1]
            torch.testing.assert_close(row[0], expected)


def test_bytes_per_position(tiny_llama):
    with torch.no_grad():
        cache = PrefixCache(load(tiny_llama), [1, 5])
    assert cache.bytes_per_position == 2 * 2 * (2 * 16) * 4  # layers, keys and values, heads x width, float32


def test_prompts_longer_than_the_model_are_an_error(tiny_llama):
    model = load(tiny_llama)
    model.config.max_position_embeddings = 8
    with torch.no_grad():
        cache = PrefixCache(model, PROMPTS[0][:3])
        cache.prepare_batch(PROMPTS, new_tokens=1)
        with pytest.raises(UserError, match=r"7 tokens and an answer of up to 2 .* 8 positions.*max_new_tokens"):
            cache.prepare_batch(PROMPTS, new_tokens=2)


def test_eval_mode_restores_every_module(tiny_llama):
    model = load(tiny_llama, adapter=True).train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("adapter", "dtype", "expected"), [(True, torch.bfloat16, True), (True, torch.float32, False),
                                       (False, torch.bfloat16, False)]
)  # fmt: skip
def test_only_an_adapted_half_precision_base_runs_in_autocast(tiny_llama, adapter, dtype, expected):
    model = load(tiny_llama, adapter)
    model.get_input_embeddings().to(dtype)
    with eval_mode(model):
        assert torch.is_autocast_enabled("cpu") is expected
    assert not torch.is_autocast_enabled("cpu")


def test_truncated_prompts_and_counts():
    chat = Bytes()
    chat.truncate_prompt = lambda task, content, limit: ([9] * limit, len(content))
    contents = ["a", "b" * 60]
    prompts = chat.prompt_ids(TASK, contents)
    result, cuts = truncate_prompts(chat, TASK, contents, prompts, 40)
    assert (result, cuts) == ([prompts[0], [9] * 40], [0, 60])
    assert truncate_prompts(chat, TASK, contents, prompts, 80) == (prompts, [0, 0])
    with pytest.raises(UserError, match="lower max_new_tokens"):
        truncate_prompts(chat, TASK, contents, prompts, len(chat.prefix_ids(TASK)) + 7)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 8192, "sliding_window": None}, 8192),
        ({"max_position_embeddings": 8192, "sliding_window": 4096}, 4096),
        ({}, 1 << 20),
    ],
)
def test_max_positions(config, expected):
    assert max_positions(SimpleNamespace(**config)) == expected


def test_common_prefix_leaves_a_token_of_each_prompt():
    assert common_prefix([1, 2, 3], [[1, 2, 3, 4], [1, 2, 3, 5, 6]]) == [1, 2, 3]
    assert common_prefix([1, 2, 3], [[1, 2, 3], [1, 2, 3, 5]]) == [1, 2]
    assert common_prefix([1, 2, 3], [[1, 2, 9, 9], [1, 2, 3, 5]]) == [1, 2]
    assert common_prefix([1, 2, 3], [[7], [1, 2, 3, 5]]) == []
    assert common_prefix([], [[1]]) == []


def test_batches_are_longest_first_and_complete():
    assert list(batches_by_length([3, 9, 1, 9, 4], 2)) == [[1, 3], [4, 0], [2]]
    assert list(batches_by_length([], 2)) == []
