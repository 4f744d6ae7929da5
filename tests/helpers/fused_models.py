"""Small Llama and Mistral models with LoRA, and their hidden states and gradients by the modules of transformers."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lightning_modules.models.backbone import PROJECTIONS
from tests.helpers.packed_rows import dense_mask

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "attn_implementation": "sdpa",
}  # fmt: skip


def base_model(kind, **options):
    """A causal LM with random weights; ``options`` are of its config."""
    torch.manual_seed(1)
    settings = SHAPE | {"intermediate_size": 88} | options
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**settings))
    return MistralForCausalLM(MistralConfig(**{"sliding_window": None} | settings))


def adapted(kind, targets=PROJECTIONS, layers=None, base_options=None, **options):
    """The same with LoRA of rank 5; ``options`` are PEFT's."""
    base = base_model(kind, **base_options or {})
    model = get_peft_model(
        base,
        LoraConfig(
            r=5, lora_alpha=11, target_modules=list(targets), layers_to_transform=layers, task_type="CAUSAL_LM",
            **options,
        ),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)  # zeros, PEFT's initialization, would make half of the gradients zero
    return model


def eager_hidden_states(model, ids, positions, segments):
    """Hidden states [B, T, C] before the final norm, by the modules of transformers and PEFT with a dense mask."""
    states = []
    decoder = model.get_base_model().model
    handle = decoder.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    mask = dense_mask(segments)[:, None]
    decoder(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    handle.remove()
    return states[0]


def gradients(model, hidden, segments):
    """Gradients of all trained parameters, of a random weighted sum of the hidden states without padding."""
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5)) * (segments >= 0)[..., None]
    model.zero_grad()
    (hidden * weight.to(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(got, expected, tolerance=1e-5):
    """Asserts that every gradient is within a relative distance (of norms) of the expected one."""
    assert got.keys() == expected.keys() and got
    for name, grad in got.items():
        assert (grad - expected[name]).norm() <= tolerance * expected[name].norm(), name
