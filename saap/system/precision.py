"""In which number format matrix products are computed, and by which library where that is float32.

The forward pass of tuning takes bfloat16 where the hardware multiplies in it. Everything else is float32, which torch
leaves to MKL; on AMD's processors oneDNN, which torch brings too, is about twice as fast.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from saap.system.errors import UserError

PRECISIONS = ("auto", "bf16", "fp32")
CPUINFO = Path("/proc/cpuinfo")
LARGEST_ERROR = 1e-5  # of a float32 product, relative to its largest number; bfloat16 is off by 1e-3 and more
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is what aarch64 calls it


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What matrix products run in; None is float32 throughout.

    Args:
        precision: "auto" takes bfloat16 where the hardware has it, because elsewhere it is emulated and slower than
            float32; "bf16" and "fp32" are taken as they are.
    """
    if precision not in PRECISIONS:
        raise UserError(f"the precision {precision!r} is not known: give one of {', '.join(PRECISIONS)}")
    if precision == "bf16" or (precision == "auto" and computes_bf16(device)):
        return torch.bfloat16
    return None


def computes_bf16(device: torch.device, cpuinfo: Path = CPUINFO) -> bool:
    """Whether the device multiplies bfloat16 in hardware: for a CPU its flags, where the system tells them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", _text_of(cpuinfo), re.MULTILINE)
    # A core without it would be as slow as emulation, and the threads wait for the slowest.
    return bool(flags) and all(BF16_FLAGS & set(line.split()) for line in flags)


@contextmanager
def fast_float32(cpuinfo: Path = CPUINFO) -> Iterator[None]:
    """float32 products by oneDNN inside the block or function, on AMD's processors, while they stay float32.

    torch has no switch for that alone. It hands float32 products to oneDNN where it is told that they may be rounded to
    bfloat16, which oneDNN does on tile units (AMX) only. So it is told that where there are none, and no more where a
    product shows that it was rounded. A precision that the user has set stays, and so does a machine with a GPU.
    """
    before = torch.get_float32_matmul_precision()
    if before != "highest" or not _mkl_is_slow(cpuinfo):
        yield
        return
    try:
        torch.set_float32_matmul_precision("medium")
        if not _stays_float32():
            torch.set_float32_matmul_precision(before)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _mkl_is_slow(cpuinfo: Path) -> bool:
    if torch.cuda.is_available() or not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    text = _text_of(cpuinfo)
    return re.search(r"^vendor_id\s*:\s*AuthenticAMD$", text, re.MULTILINE) is not None and "amx_bf16" not in text


def _text_of(cpuinfo: Path) -> str:
    """Empty where the system does not tell."""
    try:
        return cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _stays_float32() -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(32, 512, generator=generator), torch.randn(64, 512, generator=generator)
    expected = torch.nn.functional.linear(x.double(), weight.double())
    error = (torch.nn.functional.linear(x, weight) - expected).abs().max() / expected.abs().max()
    return error.item() <= LARGEST_ERROR
