"""Finds the device that ``inspect`` estimates for: one of a table, or this machine's GPU with a measured rate."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

import torch

from commands.inspect.memory_estimate import DEVICES, GIB, Device, device_named
from datamodules.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

MEASURED = "measured"
PRODUCT = (16384, 4096, 14336)  #: M, K, N of the product in the MLP of a 7B model, with rows of 16,384 tokens
H100_RATE = 734  #: measured TFLOP/s of this product on an H100; the table has the rate of the data sheet (989)
SECONDS = 0.5  #: duration of the measurement


@cache
def find_device(name: str) -> Device:
    """Returns the device of a name.

    Args:
        name: name in :data:`commands.inspect.memory_estimate.DEVICES`, or "measured" for this machine's GPU, whose rate
            is measured with matrix products.

    Raises:
        UserError: the name is unknown, or this machine has no GPU.
    """
    if name.lower() != MEASURED:
        return device_named(name)
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no GPU on this machine. Fix: give one of {', '.join(DEVICES)}.")
    device = torch.device("cuda")
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    rate = product_rate(device, dtype, PRODUCT)
    properties = torch.cuda.get_device_properties(device)
    source = f"{rate:.0f} TFLOP/s of matrix products measured on {properties.name}"
    return Device(properties.total_memory / GIB, rate * DEVICES["h100"].tflops / H100_RATE, source)


def product_rate(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> float:
    """Measures the rate of products of an M x K and a K x N matrix.

    Args:
        device: device of the matrices.
        dtype: dtype of both matrices.
        shape: M, K, N.

    Returns:
        The rate in TFLOP/s.
    """
    m, k, n = shape
    left, right = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    for _ in range(3):  # warm-up: the library chooses a kernel, and the GPU raises its clock
        left @ right
    _wait(device)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        left @ right
        _wait(device)
        count += 1
    return 2 * m * k * n * count / (time.perf_counter() - began) / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
