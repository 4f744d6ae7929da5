"""Settings of a resumed fit: which ones the configuration sets, and which ones must be the checkpoint's."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from datamodules.errors import UserError
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, LoRA
from lightning_modules.resumed_settings import ResumedSettings, check_fixed_settings, differences
from optimizers import WarmupCosine
from tests.helpers.lm_training import Data, quiet_trainer


def module(folder, optimizer=AdamW, lr=1e-3, schedule=WarmupCosine, alpha=8.0, rslora=False, adapter=None, **options):
    lora = LoRA(rank=4, alpha=alpha, use_rslora=rslora, dropout=options.pop("dropout", 0.0))
    return CausalLMModule(
        Backbone(str(folder), dtype="float32", lora=lora, adapter=adapter), CompletionCrossEntropy(),
        partial(optimizer, lr=lr, **options), schedule,
    )  # fmt: skip


def train(model, folder, steps, checkpoint=None):
    """Fits to a number of steps and saves; returns the module and the rates of its steps."""
    trainer = quiet_trainer(folder, max_steps=steps, log_every_n_steps=1, enable_checkpointing=False)
    rates, step = [], model.configure_gradient_clipping

    def record(optimizer, *args, **kwargs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer, *args, **kwargs)

    model.configure_gradient_clipping = record
    trainer.fit(model, Data(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return trainer, rates


@pytest.mark.parametrize("schedule", [None, WarmupCosine, CosineAnnealingLR, partial(OneCycleLR, 1e-2)])
def test_without_a_change_the_rates_are_those_of_an_uninterrupted_run(tiny_llama, tmp_path, schedule):
    if isinstance(schedule, partial):
        schedule = one_cycle
    whole = train(module(tiny_llama, schedule=schedule), tmp_path, 8)[1]
    first = train(shorter(module(tiny_llama, schedule=schedule)), tmp_path, 3)[1]
    second = train(module(tiny_llama, schedule=schedule), tmp_path, 8, tmp_path / "3.ckpt")[1]
    assert first + second == whole


def one_cycle(optimizer, steps):
    return OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)


def shorter(model):
    """Lets a schedule have 8 steps although the fit stops earlier."""
    schedule = model.lr_scheduler
    model.lr_scheduler = (lambda optimizer, steps: schedule(optimizer, 8)) if schedule is not None else None
    return model


def test_a_new_learning_rate_and_decay_are_used(tiny_llama, tmp_path):
    train(module(tiny_llama, weight_decay=0.5), tmp_path, 3)
    trainer, rates = train(module(tiny_llama, lr=1e-5, weight_decay=0.25), tmp_path, 6, tmp_path / "3.ckpt")
    expected = train(module(tiny_llama, lr=1e-5), tmp_path / "fresh", 6)[1]
    assert rates == expected[3:]
    groups = trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.25] and groups[0]["initial_lr"] == 1e-5
    assert trainer.optimizers[0].state[groups[0]["params"][0]]["step"] == 6  # the moments are the checkpoint's


def test_a_new_learning_rate_is_used_without_a_schedule(tiny_llama, tmp_path):
    train(module(tiny_llama, schedule=None), tmp_path, 2)
    assert train(module(tiny_llama, schedule=None, lr=1e-5), tmp_path, 3, tmp_path / "2.ckpt")[1] == [[1e-5]]


def test_a_new_schedule_is_used(tiny_llama, tmp_path):
    train(module(tiny_llama, schedule=CosineAnnealingLR), tmp_path, 2)
    rates = train(module(tiny_llama), tmp_path, 5, tmp_path / "2.ckpt")[1]
    assert rates == train(module(tiny_llama), tmp_path / "fresh", 5)[1][2:]


def test_changed_settings_are_listed(tiny_llama, tmp_path, caplog):
    train(module(tiny_llama), tmp_path, 2)
    with caplog.at_level("INFO"):
        train(module(tiny_llama, lr=1e-5, dropout=0.1), tmp_path, 3, tmp_path / "2.ckpt")
    assert (
        "resume: the configuration replaces settings of the checkpoint: backbone.lora.dropout 0.0 -> 0.1, "
        "optimizer.lr 0.001 -> 1e-05"
    ) in caplog.messages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": SGD}, "optimizer=torch.optim.SGD: the checkpoint holds the state of torch.optim.AdamW, which "
         "another class can't use. Fix: set it to torch.optim.AdamW, or start a new run from the trained weights"),
        ({"alpha": 16.0}, "backbone.lora.alpha=16.0: the checkpoint was trained with 8.0, and its weights fit no other "
         "value. Fix: set it to 8.0"),
        ({"rslora": True}, "backbone.lora.use_rslora=True: the checkpoint was trained with False"),
    ],
)  # fmt: skip
def test_a_setting_that_the_state_does_not_fit_is_refused(tiny_llama, tmp_path, change, message):
    train(module(tiny_llama), tmp_path, 2)
    with pytest.raises(UserError) as caught:
        train(module(tiny_llama, **change), tmp_path, 3, tmp_path / "2.ckpt")
    assert f"model.init_args.{message}" in str(caught.value)


def test_an_evaluation_refuses_another_alpha_but_not_another_optimizer(tiny_llama, tmp_path):
    train(module(tiny_llama), tmp_path, 2)
    options = {"ckpt_path": tmp_path / "2.ckpt", "weights_only": True}
    quiet_trainer(tmp_path).validate(module(tiny_llama, SGD), Data(), **options)
    with pytest.raises(UserError, match=r"lora\.alpha=16\.0"):
        quiet_trainer(tmp_path).validate(module(tiny_llama, alpha=16.0), Data(), **options)


def test_a_start_from_another_adapter_is_refused():
    before, after = {"backbone": {"adapter": None}}, {"backbone": {"adapter": "folder"}}
    with pytest.raises(UserError, match=r"backbone\.adapter=folder: the checkpoint was trained with null"):
        check_fixed_settings(before, after)
    check_fixed_settings(before, before)
    check_fixed_settings({}, after)  # written by a module that stored no arguments


def test_a_checkpoint_of_weights_only_is_refused():
    with pytest.raises(UserError, match=r"the checkpoint holds weights only"):
        ResumedSettings().compare({"state_dict": {}}, {}, {}, fitting=True)
    ResumedSettings().compare({"state_dict": {}}, {}, {}, fitting=False)


def test_state_in_the_groups_of_an_optimizer_is_kept():
    """Some optimizers, for example schedule-free ones, count steps in their parameter groups."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    optimizer.param_groups[0]["k"] = 0
    resumed = ResumedSettings()
    resumed.remember(optimizer)
    trees = [{"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": lr}}} for lr in (0.1, 0.2)]
    resumed.compare({"optimizer_states": []}, *trees, fitting=True)
    optimizer.param_groups[0].update(k=7, lr=0.3)
    resumed.apply(SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[], global_step=7))
    assert optimizer.param_groups[0]["k"] == 7 and optimizer.param_groups[0]["lr"] == 0.1


def test_differences_name_settings_without_init_args():
    before = {"class_path": "A", "init_args": {"a": 1, "b": [1, 2]}}
    after = {"class_path": "A", "init_args": {"a": 2, "b": (1, 2), "c": None}}
    assert list(differences(before, after, "x")) == ["x.a 1 -> 2"]
    assert list(differences({"a": {}}, {"a": None}, "")) == ["a {} -> null"]
