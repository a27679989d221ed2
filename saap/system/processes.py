"""The device that a process computes on, and several that were started together by ``accelerate launch``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env, patch_environment

from saap.base.errors import UserError
from saap.system.device_names import AUTO, device_of


@contextmanager
def computing_on(name: str) -> Iterator[None]:
    """Make accelerate compute on the device of this name inside the block: see :func:`training_device`.

    Raises UserError: no such device, or one that ``accelerate launch`` has not chosen for its processes.
    """
    if "WORLD_SIZE" in os.environ:
        if name != AUTO and torch.device(name).type != training_device().type:
            raise UserError(f"accelerate launch has chosen {training_device().type}, not {name}: leave --device out")
        yield
        return
    device = device_of(name)
    if PartialState._shared_state and PartialState().device != device:  # of an earlier call in this process
        AcceleratorState._reset_state(reset_partial_state=True)
    with patch_environment(accelerate_torch_device=str(device)):
        yield


def is_main_process() -> bool:
    """Whether this process writes files and talks to the person; of several, one does."""
    return bool(PartialState(cpu=meet_on_cpus()).is_main_process)


def meet_on_cpus() -> bool:
    """Whether the processes are on CPUs: accelerate looks for them there only when it is told to."""
    # Every process loads the model; transformers would leave it empty in all but the first, for accelerate to fill.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    several = "WORLD_SIZE" in os.environ and not (torch.cuda.is_available() or torch.xpu.is_available())
    return several or parse_flag_from_env("ACCELERATE_USE_CPU")


def training_device() -> torch.device:
    """Return the device that this process trains on."""
    device: torch.device = PartialState(cpu=meet_on_cpus()).device
    return device


def shares_parameters() -> bool:
    """Whether each process holds a part of the parameters only (FSDP)."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))
