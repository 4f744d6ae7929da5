"""The accelerator for XLA devices: a TPU, or a CPU that is divided into several virtual devices."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning.pytorch.accelerators import XLAAccelerator

from datamodules.errors import UserError
from lightning_modules.strategies.xla.compat import num_tpu_chips

_WITHOUT_TPU = "`python main.py fit --config configs/tpu_smoke.yaml` runs the same code on this CPU"
_MEMORY_KEYS = {"memory in use": "bytes_used", "peak memory": "peak_bytes_used", "memory limit": "bytes_limit"}


class PJRTAccelerator(XLAAccelerator):
    """Lightning's XLA accelerator, which also runs without a TPU and presents all devices as one (SPMD).

    Lightning's own class looks for a TPU on the PCI bus on every platform, and starts one process per device.

    Args:
        platform: ``tpu``, or ``cpu``, for which the same compiler compiles.
        virtual_devices: number of devices that the CPU is divided into; ignored on a TPU.
    """

    def __init__(self, platform: Literal["tpu", "cpu"] = "tpu", virtual_devices: int = 4) -> None:
        # Lightning's constructor is not called: it raises an error of its own if torch_xla is missing
        if virtual_devices < 1:
            raise ValueError(f"accelerator.virtual_devices {virtual_devices} is less than 1")
        self.platform, self.virtual_devices = platform, virtual_devices
        # PJRT reads the variables when it opens the devices
        os.environ["PJRT_DEVICE"] = platform.upper()
        if platform == "cpu":
            os.environ["CPU_NUM_DEVICES"] = str(virtual_devices)

    @staticmethod
    def is_available() -> bool:  # type: ignore[override]
        """Returns True, or raises an error that names what is missing and what works without it.

        Raises:
            UserError: torch_xla or the TPU is missing.
        """
        check_torch_xla()
        if os.environ.get("PJRT_DEVICE") != "CPU":
            check_tpu()
        return True

    @staticmethod
    def auto_device_count() -> int:  # type: ignore[override]
        """Returns one: the compiler partitions each operation over the devices."""
        return 1

    @staticmethod
    def parse_devices(devices: Any) -> int:
        """Accepts ``auto``, -1 and 1.

        Raises:
            UserError: it is another number.
        """
        if devices not in ("auto", -1, "-1", 1, "1"):
            raise UserError(
                f"trainer.devices {devices}: one process drives all XLA devices of this host; set it to 1 (on a CPU, "
                "accelerator.init_args.virtual_devices is their number)"
            )
        return 1

    @staticmethod
    def get_parallel_devices(devices: int | list[int]) -> list[torch.device]:
        """Returns the one device that PyTorch sees."""
        return [torch.device("xla", 0)]

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Returns current and peak memory in MiB; nothing on platforms without memory statistics."""
        import torch_xla.core.xla_model as xm

        try:
            info = xm.get_memory_info(device)
        except RuntimeError:  # a CPU has no statistics
            return {}
        return {f"{name} (MiB)": info[key] / 2**20 for name, key in _MEMORY_KEYS.items() if key in info}

    @staticmethod
    def name() -> str:
        """Returns the name in messages."""
        return "xla"


def check_torch_xla() -> None:
    """Checks that torch_xla is installed.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("torch_xla") is None:
        raise UserError(
            "accelerator PJRTAccelerator: torch_xla is not installed; `pip install -e '.[tpu]'` in an environment of "
            "its own (it needs torch 2.9.0), or train on a GPU or CPU: `python main.py fit --config configs/gpu.yaml`, "
            "`python main.py fit`"
        )


def check_tpu() -> None:
    """Checks that this machine has a TPU.

    Raises:
        UserError: torch_xla finds none.
    """
    if not num_tpu_chips():
        raise UserError(
            "accelerator.platform tpu: this machine has no TPU (torch_xla._internal.tpu.num_available_chips() finds "
            f"none of Google's on the PCI bus); {_WITHOUT_TPU}"
        )
