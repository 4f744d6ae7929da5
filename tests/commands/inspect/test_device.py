"""The measured device: its rate, and its memory and rate in the units of the table."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from commands.inspect.device import find_device, product_rate
from datamodules.errors import UserError


def test_the_rate_is_the_arithmetic_of_the_products_divided_by_the_time(monkeypatch):
    clock = itertools.count()  # every reading is a second later
    monkeypatch.setattr("commands.inspect.device.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("commands.inspect.device.SECONDS", 4)
    rate = product_rate(torch.device("cpu"), torch.float32, (30, 40, 50))
    assert rate == pytest.approx(3 * 2 * 30 * 40 * 50 / 5 / 1e12)


def test_this_machines_gpu_is_scaled_to_the_rate_of_the_table(monkeypatch):
    properties = SimpleNamespace(total_memory=80 * 2**30, name="NVIDIA Test")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    monkeypatch.setattr("commands.inspect.device.product_rate", lambda *_: 367.0)
    find_device.cache_clear()
    device = find_device("measured")
    find_device.cache_clear()
    assert (device.memory, device.tflops) == (80, 989 / 2)
    assert device.source == "367 TFLOP/s of matrix products measured on NVIDIA Test"


def test_without_a_gpu_nothing_can_be_measured(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device measured: torch finds no GPU"):
        find_device("measured")


def test_a_device_of_the_table_is_found_in_any_case():
    assert find_device("H100") == find_device("h100")
    with pytest.raises(UserError, match="--device abacus"):
        find_device("abacus")
