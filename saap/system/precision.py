"""The number format of matrix products, and the library that computes them in float32.

The forward pass of tuning takes bfloat16 where the hardware multiplies faster in it. Everything else is float32, which
torch leaves to MKL; on AMD's processors oneDNN, which torch brings too, is about twice as fast.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median

import torch

from saap.base.errors import UserError

PRECISIONS = ("auto", "bf16", "fp32")
CPUINFO = Path("/proc/cpuinfo")
LARGEST_ERROR = 1e-5  # of a float32 product, relative to its largest number; bfloat16 is off by 1e-3 and more
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is what aarch64 calls it
LEAST_GAIN = 1.2  # for less speed than this, bfloat16 is not worth its rounding
TIMED_S = 0.05  # for each of the two formats


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Choose the type that matrix products run in; None is float32 throughout.

    Args:
        precision: "auto" takes bfloat16 where the hardware has it and it is faster. An Emerald Rapids without AMX
            has it and takes twice as long (studies/README.md, "Settled"); "bf16" and "fp32" are taken as they are.
    """
    if precision not in PRECISIONS:
        raise UserError(f"the precision {precision!r} is not known: give one of {', '.join(PRECISIONS)}")
    if precision == "bf16" or (precision == "auto" and _gains_by_bf16(device)):
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


def _gains_by_bf16(device: torch.device) -> bool:
    return computes_bf16(device) and (device.type != "cpu" or bf16_gain() >= LEAST_GAIN)


@cache  # one answer for a whole run
def bf16_gain() -> float:
    """Measure how many times as fast as in float32 this CPU computes a product in bfloat16."""
    cpu = torch.device("cpu")
    rates = [product_rate(512, 576, 1536, dtype, cpu, TIMED_S) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] / rates[1]


def product_rate(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> float:
    """Measure operations per second of a product (rows, inputs) x (inputs, outputs): the median over ``seconds``."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    x = torch.randn(rows, inputs, generator=generator, device=device, dtype=dtype)
    matrix = torch.randn(inputs, outputs, generator=generator, device=device, dtype=dtype)
    times: list[float] = []
    with fast_float32(), torch.no_grad():
        float((x @ matrix)[0, 0])  # not timed: threads start
        while sum(times) < seconds:
            began = time.perf_counter()
            float((x @ matrix)[0, 0])  # waits for a GPU
            times.append(time.perf_counter() - began)
    return 2 * rows * inputs * outputs / median(times)


@contextmanager
def fast_float32(cpuinfo: Path = CPUINFO) -> Iterator[None]:
    """Compute float32 products by oneDNN inside the block or function, on AMD's processors, while they stay float32.

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
    """Read a file of the system; empty where there is none."""
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
