"""The contents of checkpoints and adapter folders."""

from functools import partial

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from datamodules.errors import UserError
from lightning_modules import Backbone, CausalLMModule, Distillation, LoRA
from tests.helpers.lm_training import (
    Data,
    assert_same,
    checkpointed,
    examples,
    fit,
    module_for,
    one_by_one,
    quiet_trainer,
    trained,
)  # fmt: skip


def test_a_checkpoint_holds_trainable_tensors_only(tiny_llama, tmp_path):
    module = module_for(tiny_llama, Distillation())
    _, path = checkpointed(module, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(trained(module))
    assert all("lora_" in name for name in checkpoint["state_dict"])


class Decay(torch.optim.lr_scheduler.LambdaLR):
    """A schedule that does not depend on the length of the run."""

    def __init__(self, optimizer, total_steps):
        super().__init__(optimizer, lambda step: 0.9**step)


def test_resume_equals_uninterrupted(tiny_llama, tmp_path):
    arguments = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "lr_scheduler": Decay}
    options = {"max_steps": -1, "accumulate_grad_batches": 3}
    whole = module_for(tiny_llama, **arguments)
    fit(whole, one_by_one(), tmp_path, max_epochs=2, **options)
    half = module_for(tiny_llama, **arguments)
    fit(half, one_by_one(), tmp_path, max_epochs=1, **options).save_checkpoint(tmp_path / "half.ckpt")
    rest = CausalLMModule(half.backbone, half.objective, **arguments)
    trainer = quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=False, **options)
    trainer.fit(rest, Data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 6
    assert_same(trained(rest), trained(whole), atol=0)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"num_top_layers": 1}, "checkpoint has unknown 14 tensors"),
        ({"rank": 8}, "checkpoint does not fit: .* size mismatch"),
        ({"target_modules": ("q_proj", "v_proj")}, "checkpoint has unknown 20 tensors"),
    ],
)
def test_a_checkpoint_of_another_backbone_is_refused(tiny_llama, tmp_path, lora, message):
    _, path = checkpointed(module_for(tiny_llama), tmp_path)
    with pytest.raises(UserError, match=message):
        CausalLMModule.load_from_checkpoint(path, backbone=Backbone(str(tiny_llama), lora=LoRA(**{"rank": 4} | lora)))
    _, path = checkpointed(module_for(tiny_llama, target_modules=("q_proj",)), tmp_path)
    with pytest.raises(UserError, match="checkpoint lacks 24 tensors"):
        quiet_trainer(tmp_path).validate(module_for(tiny_llama), Data(), ckpt_path=path, weights_only=True)


def test_the_adapter_loads_with_plain_peft(tiny_llama, tmp_path):
    module = module_for(tiny_llama)
    fit(module, one_by_one(), tmp_path)
    module.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert not list((tmp_path / "adapter").glob("*.bin"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tiny_llama)
    ids = examples()[0][0][None]
    assert torch.equal(loaded.eval()(ids).logits, module.model.eval()(ids).logits)
    again = Backbone(str(tiny_llama), adapter=str(tmp_path / "adapter")).build()
    assert torch.equal(again.eval()(ids).logits, module.model(ids).logits)
