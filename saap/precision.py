"""In which number format the forward pass computes: bfloat16 where the hardware multiplies in it, else float32."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from saap.errors import SaapError

PRECISIONS = ("auto", "bf16", "fp32")
CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is what aarch64 calls it


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What matrix products run in; None is float32 throughout.

    Args:
        precision: "auto" takes bfloat16 where the hardware has it, because elsewhere it is emulated and slower than
            float32; "bf16" and "fp32" are taken as they are.

    Raises:
        SaapError: another precision.
    """
    if precision not in PRECISIONS:
        raise SaapError(f"the precision {precision!r} is not known: give one of {', '.join(PRECISIONS)}")
    if precision == "bf16" or (precision == "auto" and computes_bf16(device)):
        return torch.bfloat16
    return None


def computes_bf16(device: torch.device, cpuinfo: Path = CPUINFO) -> bool:
    """Whether the device multiplies bfloat16 in hardware: for a CPU its flags, where the system tells them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    # A core without it would be as slow as emulation, and the threads wait for the slowest.
    return bool(flags) and all(BF16_FLAGS & set(line.split()) for line in flags)
