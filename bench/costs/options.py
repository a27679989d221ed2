"""Options of timing layer costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from saap.base.options import COUNT, THREADS, Option
from saap.base.values import parse_counts


@dataclass(frozen=True)
class CostsOptions:
    """Each thread count is measured by itself."""

    threads: Annotated[
        tuple[Annotated[int, THREADS], ...] | None,
        Option("Thread counts; default: all physical cores.", flags=("-t", "--threads"), parse=parse_counts),
    ] = None
    engine: Annotated[
        Literal["onnxruntime", "llama.cpp"], Option("What runs the model: a plan holds for the engine that was timed.")
    ] = "onnxruntime"
    # The default is the middle of 128 tokens after a prompt of 128.
    depth: Annotated[
        int,
        Option("Tokens in the cache at the first step of every turn.", flags=("-d", "--depth")),
        COUNT,
    ] = 192
    rounds: Annotated[int, Option("Fresh processes that time each stack.", shown=False), Meta(ge=1, le=1000)] = 6
    seconds: Annotated[
        float, Option("Seconds that one process takes steps for, after loading.", shown=False), Meta(ge=0)
    ] = 4.0
    timeout_s: Annotated[float, Option("Seconds of one process.", flags=("--time-limit",), shown=False), Meta(gt=0)] = (
        600.0
    )
