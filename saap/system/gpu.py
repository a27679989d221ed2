"""The device that computes; what is written and what is handed over stays on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from saap.base.errors import UserError
from saap.base.needs import FREE_SHARE, PROCESS, Needs, gigabytes, parts

CPU = torch.device("cpu")


def fits_device(needs: Needs, device: torch.device) -> bool:
    """Whether a GPU has room for what would be in memory; the CPU's own is for :func:`saap.base.needs.fits`."""
    return device.type == "cpu" or sum(_on_gpu(needs).values()) <= FREE_SHARE * _free(device)


def check_device(needs: Needs, device: torch.device, what: str, advice: str) -> None:
    """Raise UserError with the sum where a GPU's memory would run out; ``what`` is the command, as ``tuning``."""
    if not fits_device(needs, device):
        asked = _on_gpu(needs)
        raise UserError(
            f"{what} needs {gigabytes(sum(asked.values()))} on {device} ({parts(asked)}), and "
            f"{gigabytes(_free(device))} are free there: {advice}"
        )


def _on_gpu(needs: Needs) -> dict[str, int]:
    return {name: size - PROCESS if name == "the process" else size for name, size in needs.memory.items()}


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0])


@contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """End with one line where a GPU's memory runs out inside the block; ``advice`` is what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{str(error).split('. ')[0]}: {advice}") from None
