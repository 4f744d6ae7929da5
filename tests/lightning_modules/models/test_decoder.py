"""Decoder and head against the forward pass of transformers, for architectures with scales, caps and windows."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from datamodules.batch import Batch
from datamodules.errors import UserError
from lightning_modules.models.backbone import Backbone, LoRA
from lightning_modules.models.decoder import Decoder

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "phi3": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 4, "attn_logit_softcapping": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
}


def build(name, attention="sdpa"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **TINY | MODELS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the initialization, so that positions and caps matter
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def two_examples():
    """Two examples of 9 and 6 tokens, separately and packed in a row with a token of padding."""
    first, second = torch.arange(5, 14), torch.arange(40, 46)
    ids = torch.cat([first, second, torch.tensor([0])])[None]
    positions = torch.cat([torch.arange(9), torch.arange(6), torch.tensor([0])])[None]
    segments = torch.tensor([[1] * 9 + [2] * 6 + [-1]])
    return first, second, Batch(ids, positions, torch.full_like(ids, -100), segments)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_packed_logits_equal_those_of_transformers(name, attention):
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers runs Gemma 2 by eager or flex_attention only: sdpa can't cap scores")
    model = build(name, attention)
    first, second, batch = two_examples()
    decoder = Decoder(model)
    logits = decoder.head(decoder.hidden_states(batch)[0])
    expected = torch.cat([model(ids[None]).logits[0] for ids in (first, second)])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits[:15], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_window_counts_positions_after_a_shared_prefix():
    """Example b attends to the prefix by its position, although example a is between them in the row."""
    model = build("mistral")
    prefix, a, b = torch.arange(5, 8), torch.arange(20, 26), torch.arange(40, 43)
    ids = torch.cat([prefix, a, b])[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5]])
    segments = torch.tensor([[0] * 3 + [1] * 6 + [2] * 3])
    hidden = Decoder(model).hidden_states(Batch(ids, positions, torch.full_like(ids, -100), segments))
    separate = model.get_decoder()(torch.cat([prefix, b])[None]).last_hidden_state
    torch.testing.assert_close(hidden[0, 9:], separate[0, 3:], rtol=1e-4, atol=1e-4)


def test_layers_that_would_mix_examples_raise_an_error():
    config = AutoConfig.for_model("qwen3_next", **TINY | {"num_experts": 2, "num_experts_per_tok": 1})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="layers of type linear_attention would mix the examples"):
        Decoder(model)


def test_float32_adapters_on_a_bfloat16_base_compute_in_bfloat16(tiny_llama):
    model = Backbone(str(tiny_llama), dtype="bfloat16", lora=LoRA(rank=4)).build()
    _, _, batch = two_examples()
    decoder = Decoder(model)
    hidden = decoder.hidden_states(batch)
    assert hidden.dtype == torch.bfloat16
    assert decoder.head(hidden).dtype == torch.float32
