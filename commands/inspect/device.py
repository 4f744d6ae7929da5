"""The device that ``inspect`` estimates for: one of the table, or the GPU of this machine, measured."""

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
PRODUCT = (16384, 4096, 14336)  #: of a 7B model's MLP with rows of 16,384 tokens
H100_RATE = 734  #: TFLOP/s of that product on an H100; the rates in the table are the data sheets' (989)
SECONDS = 0.5  #: of products that are timed


@cache
def find_device(name: str) -> Device:
    """Looks a device up; "measured" times matrix products on this machine's GPU.

    Raises:
        UserError: there is none of this name, or no GPU to measure.
    """
    if name.lower() != MEASURED:
        return device_named(name)
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU on this machine; name one of {', '.join(DEVICES)}")
    device = torch.device("cuda")
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    rate = product_rate(device, dtype, PRODUCT)
    facts = torch.cuda.get_device_properties(device)
    source = f"{rate:.0f} TFLOP/s of matrix products measured on {facts.name}"
    return Device(facts.total_memory / GIB, rate * DEVICES["h100"].tflops / H100_RATE, source)


def product_rate(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> float:
    """Times products of an M x K and a K x N matrix.

    Args:
        device: where.
        dtype: of both matrices.
        shape: M, K, N.

    Returns:
        TFLOP/s.
    """
    m, k, n = shape
    left, right = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    for _ in range(3):  # the first ones choose a kernel and raise the clock
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
