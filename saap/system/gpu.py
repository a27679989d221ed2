"""The GPU that computes, where one is asked for; what is written and what is handed over stays on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from saap.system.errors import UserError
from saap.system.needs import FREE_SHARE, PROCESS, Needs


def device_of(name: str) -> torch.device:
    """The device of a name; ``cuda`` is each process's own where ``accelerate launch`` started several.

    Raises UserError: no such device here, or one of another kind than CPUs and CUDA GPUs.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not known: give cpu, cuda, or a number as cuda:1")
    if device.type == "cuda":
        there = torch.cuda.device_count()
        number = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if number >= there:
            raise UserError(f"{name} is not there, torch {torch.__version__} sees {there} GPUs: leave --device out")
        device = torch.device("cuda", number)
    return device


def fits_device(needs: Needs, name: str) -> bool:
    """Whether the device has room for what would be in memory."""
    device = device_of(name)
    if device.type == "cpu":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return needs.memory_bytes - PROCESS <= FREE_SHARE * free


@contextmanager
def out_of_memory() -> Iterator[None]:
    """A GPU's memory that runs out inside the block ends in one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = "give --stream, fewer --sequences, a smaller --length, or leave --device out"
        raise UserError(f"{str(error).split('. ')[0]}: {advice}") from None
