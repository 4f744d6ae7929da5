"""Rates of the schedules against values computed by hand, and on resuming."""

import math
from collections.abc import Callable

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optimizers import WarmupCosine, WarmupLinear


def make_optimizer(*rates):
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (1.0,)])


def rates_of(scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_cosine_values():
    rates = rates_of(WarmupCosine(make_optimizer(), 8, warmup_steps=3, min_lr_ratio=0.2), 11)
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(6)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, *cosine, 0.2, 0.2])
    assert rates[3] == 1.0


def test_linear_values():
    rates = rates_of(WarmupLinear(make_optimizer(), 6, warmup_steps=2, min_lr_ratio=0.0), 8)
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0, 0])


@pytest.mark.parametrize("schedule", [WarmupCosine, WarmupLinear])
def test_no_warmup_and_one_step(schedule):
    assert rates_of(schedule(make_optimizer(), 1, warmup_steps=0), 1) == [1.0]
    assert rates_of(schedule(make_optimizer(), 1), 1) == [1.0]


@pytest.mark.parametrize("schedule", [WarmupCosine, WarmupLinear])
def test_a_run_shorter_than_its_warmup(schedule):
    assert rates_of(schedule(make_optimizer(), 2, warmup_steps=4), 2) == pytest.approx([1 / 5, 2 / 5])


def test_warmup_as_a_fraction_of_the_run():
    by_fraction = rates_of(WarmupCosine(make_optimizer(), 200, warmup_steps=0.03), 200)
    assert by_fraction == rates_of(WarmupCosine(make_optimizer(), 200, warmup_steps=6), 200)


def test_each_group_has_its_own_peak():
    scheduler = WarmupLinear(make_optimizer(1.0, 0.1), 4, warmup_steps=1)
    assert scheduler.get_last_lr() == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize("schedule", [WarmupCosine, WarmupLinear])
def test_resumed_equals_uninterrupted(tmp_path, schedule):
    whole = rates_of(schedule(make_optimizer(), 20), 20)
    optimizer = make_optimizer()
    scheduler = schedule(optimizer, 20)
    start = rates_of(scheduler, 7)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer = make_optimizer()
    scheduler = schedule(optimizer, 20)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    assert start + rates_of(scheduler, 13) == whole


def test_a_longer_run_follows_its_own_config_after_resume():
    scheduler = WarmupCosine(make_optimizer(), 10)
    rates_of(scheduler, 10)
    longer = WarmupCosine(make_optimizer(), 40)
    longer.load_state_dict(scheduler.state_dict())
    rates = rates_of(longer, 30)  # the first is the checkpoint's own last one
    assert rates[1:] == pytest.approx(rates_of(WarmupCosine(make_optimizer(), 40), 40)[11:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "total_steps 0"),
        ((float("inf"),), "total_steps inf"),
        ((10, -1), "warmup_steps -1"),
        ((10, -0.1), r"warmup_steps -0\.1"),
        ((10, 1.5), r"warmup_steps 1\.5"),
        ((10, 2, 1.5), r"min_lr_ratio 1\.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosine(make_optimizer(), *arguments)


@pytest.mark.parametrize("name", ["WarmupCosine", "WarmupLinear"])
@pytest.mark.parametrize("warmup_steps", [0.25, 2])
def test_schedules_are_built_from_a_class_path(name, warmup_steps):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scheduler", type=Callable[[Optimizer, int], LRScheduler] | None)
    arguments = {"warmup_steps": warmup_steps, "min_lr_ratio": 0.5}
    config = parser.parse_object({"scheduler": {"class_path": f"optimizers.{name}", "init_args": arguments}})
    assert config.scheduler.init_args.warmup_steps == warmup_steps
    scheduler = parser.instantiate(config).scheduler(make_optimizer(), 8)
    rates = rates_of(scheduler, 10)
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[-1] == pytest.approx(0.5)
