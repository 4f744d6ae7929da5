"""The precision plugin; no device is needed."""

import pytest
import torch

from datamodules.errors import UserError
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, LoRA
from lightning_modules.models.backend import check_precision
from lightning_modules.strategies import TruePrecision


def test_bf16_true_converts_weights_and_sets_the_default_type():
    model = TruePrecision("bf16-true").convert_module(torch.nn.Linear(2, 2))
    assert model.weight.dtype == torch.bfloat16
    with TruePrecision("bf16-true").tensor_init_context():
        assert torch.zeros(1).dtype == torch.bfloat16
    assert torch.zeros(1).dtype == torch.float32


def test_32_true_keeps_the_types_of_the_backbone(tiny_mistral):
    module = CausalLMModule(
        Backbone(str(tiny_mistral), dtype="bfloat16", lora=LoRA(rank=2)), CompletionCrossEntropy(), torch.optim.AdamW
    )
    plugin = TruePrecision("32-true")
    with plugin.tensor_init_context():
        module.configure_model()
    before = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert set(before.values()) == {torch.bfloat16, torch.float32}
    assert {name: p.dtype for name, p in plugin.convert_module(module).named_parameters()} == before


def test_the_training_module_accepts_32_true_only():
    check_precision(TruePrecision(), "bfloat16")
    with pytest.raises(UserError, match=r"trainer\.precision=bf16-true.*Fix"):
        check_precision(TruePrecision("bf16-true"), "bfloat16")
