"""Several processes that were started together by ``accelerate launch``."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


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
    """Where this process trains."""
    device: torch.device = PartialState(cpu=meet_on_cpus()).device
    return device


def trains_on_cpu() -> bool:
    """Whether training is on this machine's own memory, with whole parameters in each process: neither GPU nor FSDP."""
    state = PartialState(cpu=meet_on_cpus())
    return state.device.type == "cpu" and not parse_flag_from_env("ACCELERATE_USE_FSDP")
