"""The choice of kernels and the number of devices in the estimates, compared with the model and the Trainer."""

from dataclasses import replace

import pytest
import torch

from commands.inspect.plan import _count, kernels_of
from lightning_modules.models.backbone import Backbone, LoRA
from lightning_modules.models.fused_decoder import build_decoder

KERNELS = [
    {}, {"kernels": "eager"}, {"lora": None}, {"lora": LoRA(rank=2, use_dora=True)}, {"lora": LoRA(rank=2,
    dropout=0.1)},
    {"activation_checkpointing": "selective"}, {"kernels": "eager", "activation_checkpointing": "full"},
]  # fmt: skip


@pytest.mark.parametrize("changes", KERNELS, ids=str)
def test_the_estimated_kernels_are_those_of_the_model(tiny_mistral, changes):
    backbone = replace(Backbone(str(tiny_mistral), lora=LoRA(rank=2)), **changes)
    model = backbone.build()
    _, why = build_decoder(model, backbone.kernels, backbone.activation_checkpointing, torch.device("cpu"))
    estimated = kernels_of(backbone, model.config, "cpu", 4)
    assert why.startswith(f"{estimated} kernels")
    assert kernels_of(backbone, model.config, "gpu", 4) == "eager"  # flash kernels take 16 bits
    assert kernels_of(backbone, model.config, "tpu", 2) == "eager"
    assert kernels_of(backbone, model.config, "gpu", 2, divided=True) == "eager"


def test_devices_are_counted_as_by_lightnings_trainer():
    assert [_count(devices, "cpu") for devices in (2, "3", "0,1", "auto", -1, [0, 4, 5], None)] == [2, 3, 2, 1, 1, 3, 1]
