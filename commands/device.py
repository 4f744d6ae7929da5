"""The option ``--device`` of the commands that load a model."""

from __future__ import annotations

import torch

from datamodules.errors import UserError, one_line


def pick_device(name: str) -> torch.device:
    """Returns the device of a name.

    Args:
        name: auto (the first GPU if there is one, else the CPU), cpu, cuda or cuda:N.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {one_line(error, 120)}. Fix: give auto, cpu or cuda.") from error
    return device
