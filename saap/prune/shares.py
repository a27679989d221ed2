"""Several processes that prune one model together: each takes its share of the calibration sequences.

Under ``accelerate launch`` all of them run the same program. They meet where something is summed over sequences, which
is scores, losses and the sums of a regression, and get the same bits there, so that all choose the same; one of them
writes. What they hand over goes through gloo from CPU to CPU. Inside :func:`joined` there may be several, elsewhere
there is one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from safetensors.torch import load, save

from saap.base.errors import UserError

Item = TypeVar("Item")
PATIENCE = timedelta(hours=6)  # until a process counts as lost: one may wait for a layer's share of another


@dataclass(frozen=True)
class Shares:
    """Which share is this process's."""

    rank: int = 0  # number of this process; process 0 is the main one, which writes and talks to the person
    count: int = 1  # how many there are
    group: torch.distributed.ProcessGroup | None = None  # of torch.distributed; None where there is one process

    @property
    def main(self) -> bool:
        return self.rank == 0

    def mine(self, items: Sequence[Item]) -> list[Item]:
        """Every so many-th item."""
        return list(items[self.rank :: self.count])

    def each(self, items: Sequence[Item], number_of: Callable[[Item], float]) -> list[float]:
        """A number for every item, in their order, each found by one process."""
        if self.count == 1:
            return [number_of(item) for item in items]
        numbers = torch.zeros(len(items), dtype=torch.float64)
        for place in range(self.rank, len(items), self.count):
            numbers[place] = number_of(items[place])
        return [float(x) for x in self.add_up(numbers)]

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place; the same bits in all of them."""
        if self.count > 1:
            here = tensor.cpu()
            torch.distributed.all_reduce(here, group=self.group)
            if here is not tensor:
                tensor.copy_(here)
        return tensor

    def total(self, number: float) -> float:
        return float(self.add_up(torch.tensor(number, dtype=torch.float64))) if self.count > 1 else number

    def agreed(self, value: Item) -> Item:
        """What the main process has, in all of them; JSON."""
        if self.count == 1:
            return value
        sent = self._sent(json.dumps(value).encode() if self.main else b"", 0)
        found: Item = json.loads(sent)
        return found

    def tensors(self, owner: int, found: dict[str, torch.Tensor] | UserError | None) -> dict[str, torch.Tensor]:
        """Named tensors that process ``owner`` found, in all of them; or the UserError that it met instead."""
        content = b""
        if self.rank == owner:
            assert found is not None
            content = b"\0" + save(found) if isinstance(found, dict) else b"\1" + str(found).encode()
        content = self._sent(content, owner)
        if content[:1] == b"\1":
            raise UserError(content[1:].decode())
        return load(content[1:])

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier(group=self.group)

    def _sent(self, content: bytes, owner: int) -> bytes:
        length = torch.tensor([len(content)])
        torch.distributed.broadcast(length, owner, group=self.group)
        sent = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == owner:
            sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        torch.distributed.broadcast(sent, owner, group=self.group)
        return sent.numpy().tobytes()


ALONE = Shares()
_here = ALONE


def shares() -> Shares:
    """The processes that work on this together."""
    return _here


@contextmanager
def joined() -> Iterator[Shares]:
    """Meet the other processes of ``accelerate launch`` for the time of the block; without it there is one."""
    global _here
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _here is not ALONE:
        yield _here
        return
    from saap.system.processes import is_main_process

    is_main_process()  # the processes meet
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)  # theirs may be of GPUs only
    _here = Shares(torch.distributed.get_rank(), torch.distributed.get_world_size(), group)
    try:
        yield _here
    finally:
        _here = ALONE
