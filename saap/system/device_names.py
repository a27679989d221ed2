"""Names of compute devices; nothing here imports torch before a device is asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from saap.base.errors import UserError

if TYPE_CHECKING:
    import torch

AUTO = "auto"  # a GPU where there is one, else the CPU


def check_device_is_there(name: str) -> None:
    """Raise UserError for a device that is not known or not here; only a name other than ``auto`` needs torch."""
    if name != AUTO:
        device_of(name)


def device_of(name: str = AUTO) -> torch.device:
    """Return the device of a name; ``cuda`` is each process's own where ``accelerate launch`` started several.

    ``auto`` is a GPU where torch sees one, else the CPU.

    Raises UserError: no such device here, or one of another kind than CPUs and CUDA GPUs.
    """
    import torch

    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not known: give auto, cpu, cuda, or a number as cuda:1")
    if device.type == "cuda":
        there = torch.cuda.device_count()
        number = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if number >= there:
            raise UserError(f"{name} is not there, torch {torch.__version__} sees {there} GPUs: leave --device out")
        device = torch.device("cuda", number)
    return device
