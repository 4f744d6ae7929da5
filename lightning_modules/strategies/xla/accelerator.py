"""XLA devices as PJRT finds them: a TPU, or a CPU that stands in for several devices."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning.pytorch.accelerators import XLAAccelerator

from datamodules.errors import UserError

_ELSEWHERE = "`python main.py fit --config configs/tpu_smoke.yaml` runs the same on this CPU"


class PJRTAccelerator(XLAAccelerator):
    """Lightning's XLA accelerator, which also runs without a TPU and shows all devices as one (SPMD).

    Lightning's own looks for a TPU on the PCI bus whatever the platform, and starts a process for each device.

    Args:
        platform: ``tpu``, or ``cpu``: the same compiler for this machine's cores.
        virtual_devices: devices that the CPU is divided into; a TPU has those it has.
    """

    def __init__(self, platform: Literal["tpu", "cpu"] = "tpu", virtual_devices: int = 4) -> None:
        # not Lightning's constructor, which raises its own error where torch_xla is missing
        if virtual_devices < 1:
            raise ValueError(f"accelerator.virtual_devices {virtual_devices} is less than 1")
        self.platform, self.virtual_devices = platform, virtual_devices
        # read when the devices are opened
        os.environ["PJRT_DEVICE"] = platform.upper()
        if platform == "cpu":
            os.environ["CPU_NUM_DEVICES"] = str(virtual_devices)

    @staticmethod
    def is_available() -> bool:  # type: ignore[override]
        """True; where it is not, the error says what is missing and what works without it.

        Raises:
            UserError: torch_xla or the TPU is missing.
        """
        check_torch_xla()
        if os.environ.get("PJRT_DEVICE") != "CPU":
            check_tpu()
        return True

    @staticmethod
    def auto_device_count() -> int:  # type: ignore[override]
        """One: the compiler divides each operation over the devices."""
        return 1

    @staticmethod
    def parse_devices(devices: Any) -> int:
        """Accepts ``auto``, -1 and 1.

        Raises:
            UserError: another number.
        """
        if devices not in ("auto", -1, "-1", 1, "1"):
            raise UserError(
                f"trainer.devices {devices}: one process drives all XLA devices of this host; set it to 1 (and "
                "accelerator.init_args.virtual_devices for more of them on a CPU)"
            )
        return 1

    @staticmethod
    def get_parallel_devices(devices: int | list[int]) -> list[torch.device]:
        """The one device that PyTorch sees."""
        return [torch.device("xla", 0)]

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Memory in use and at most in use, in MiB, where the platform tells."""
        import torch_xla.core.xla_model as xm

        try:
            info = xm.get_memory_info(device)
        except RuntimeError:  # CPUs do not count
            return {}
        return {f"{name} (MiB)": info[key] / 2**20 for name, key in _MEMORY.items() if key in info}

    @staticmethod
    def name() -> str:
        """Name in messages."""
        return "xla"


_MEMORY = {"memory in use": "bytes_used", "peak memory": "peak_bytes_used", "memory limit": "bytes_limit"}


def check_torch_xla() -> None:
    """Refuses a machine without torch_xla.

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
    """Refuses a machine without a TPU.

    Raises:
        UserError: torch_xla finds none.
    """
    from torch_xla._internal import tpu

    if not tpu.num_available_chips():
        raise UserError(
            "accelerator.platform tpu: this machine has no TPU (torch_xla._internal.tpu.num_available_chips() finds "
            f"none of Google's on the PCI bus); {_ELSEWHERE}"
        )
