"""Settings that the estimates read from a config, and the warnings of a plan."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace
from transformers import AutoConfig

from commands.inspect.plan import Plan, find_warnings, model_config, setup_of
from lightning_modules.models.backbone import Backbone, LoRA
from optimizers import Lion

PLAN = Plan("gpu", 2, 4, 100, "AdamW", 1e-4, 8.0)


@pytest.mark.parametrize(
    ("optimizer", "name", "state_bytes"),
    [
        (partial(Lion, lr=1e-5), "Lion", 4),
        (partial(torch.optim.AdamW, lr=1e-5), "AdamW", 8),
        (partial(torch.optim.SGD, lr=1e-5), "SGD", 0),
        (partial(torch.optim.SGD, lr=1e-5, momentum=0.9), "SGD", 4),
    ],
)
def test_the_state_of_an_optimizer_is_measured_by_a_step(optimizer, name, state_bytes):
    plan = Plan.of(Namespace(), optimizer)
    assert (plan.optimizer, plan.state_bytes, plan.lr) == (name, state_bytes, 1e-5)


def test_settings_of_the_trainer():
    strategy = Namespace(class_path="lightning_modules.strategies.FSDP2Strategy")
    trainer = Namespace(
        accelerator="gpu", devices=4, num_nodes=2, accumulate_grad_batches=3, max_steps=50, strategy=strategy
    )
    plan = Plan.of(trainer, partial(Lion, lr=1e-5))
    assert (plan.accelerator, plan.devices, plan.accumulate, plan.max_steps) == ("gpu", 8, 3, 50)
    assert plan.divided
    plan = Plan.of(Namespace(devices=1, strategy="ddp"), partial(Lion, lr=1e-5))
    assert (plan.accelerator, plan.devices, plan.accumulate, plan.max_steps) == ("auto", 1, 1, -1)
    assert not plan.divided


def test_a_class_of_accelerator_is_that_of_its_device():
    tpu = Namespace(class_path="lightning_modules.strategies.PJRTAccelerator")
    assert Plan.of(Namespace(accelerator=tpu, devices=1), partial(Lion, lr=1e-5)).accelerator == "tpu"


def test_a_config_that_can_not_be_read_has_a_reason(tmp_path):
    assert model_config(Backbone(f"random:{tmp_path}")) == (None, f"{tmp_path} has no config.json")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    config, reason = model_config(Backbone(f"random:{tmp_path}"))
    assert config is None
    assert "config.json can't be read (" in reason and "\n" not in reason and len(reason) < 250


@pytest.mark.parametrize(("dtype", "size"), [("auto", 4), ("bfloat16", 2), ("float32", 4)])
def test_bytes_of_weights_and_adapters(dtype, size, tiny_mistral):
    config = AutoConfig.from_pretrained(tiny_mistral)
    data = SimpleNamespace(batch_size=3, sequence_length=512)
    backbone = Backbone(str(tiny_mistral), dtype=dtype, lora=LoRA(rank=4, dtype="bfloat16", num_top_layers=1))
    setup = setup_of(backbone, config, data, PLAN, 0.3)
    assert (setup.compute_bytes, setup.adapter_bytes, setup.state_bytes) == (size, 2, 4.0)
    assert (setup.rank, setup.adapted_layers, setup.rows, setup.sequence_length) == (4, 1, 3, 512)
    assert setup.accumulates and setup.ranks == 1
    assert setup.kernels == ("fused" if size == 2 else "eager")
    assert setup_of(backbone, config, data, replace(PLAN, divided=True), 0.3).ranks == 2
    full = setup_of(replace(backbone, lora=None), config, data, PLAN, 0.3)
    assert (full.rank, full.adapter_bytes, full.kernels) == (0, size, "eager")


def test_a_saved_adapter_gives_rank_and_targets(tiny_mistral, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 7, "target_modules": ["q_proj"], "lora_dropout": 0}))
    config, data = AutoConfig.from_pretrained(tiny_mistral), SimpleNamespace(batch_size=1, sequence_length=64)
    setup = setup_of(Backbone(str(tiny_mistral), adapter=str(tmp_path)), config, data, PLAN, 0.3)
    assert (setup.rank, setup.targets, setup.adapter_bytes) == (7, ("q_proj",), 4)


def warnings_of(plan=PLAN, memory=None, time=None, **changes):
    summary = {
        "overflow": Counter(), "trained": Counter(risk=90), "examples": Counter(risk=100), "quarantine": Counter(),
        "counts": Counter(records=100), "packed": {"packed": SimpleNamespace(rows=10)},
    } | changes  # fmt: skip
    data = SimpleNamespace(
        tasks=["risk"], sequence_length=1024, max_quarantine=0.1, batch_size=2, packing="packed"
    )  # fmt: skip
    return find_warnings(SimpleNamespace(**summary), data, plan, memory, time)


def test_a_plan_without_problems_has_no_warning():
    assert warnings_of() == []
    assert warnings_of(overflow=Counter(risk=5), quarantine=Counter(invalid=10)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": replace(PLAN, optimizer="Lion", lr=1e-3)}, "looks like a rate for AdamW"),
        ({"overflow": Counter(risk=100)}, "50% of task risk are longer than 1024 tokens"),
        ({"overflow": Counter(risk=100), "trained": Counter()}, "every training example of task risk is longer"),
        ({"trained": Counter()}, "task risk has no training example"),
        ({"quarantine": Counter(invalid=11)}, "11 of 100 records can't be used"),
        ({"packed": {"packed": SimpleNamespace(rows=0)}}, "fewer than the 4 rows of a batch"),
        ({"counts": Counter(records=100, unsupervised=3)}, "3 examples have no label"),
        (
            {"memory": {"peak_gib": 30.0}, "time": {"fits": False, "name": "4090", "memory_gib": 23.5}},
            "the expected peak of 30.0 GiB exceeds 4090's 23.5 GiB",
        ),
    ],
)
def test_each_problem_has_its_warning(changes, words):
    (warning,) = warnings_of(**changes)
    assert words in warning
