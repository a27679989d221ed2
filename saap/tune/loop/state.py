"""The state of a training run in one file, so that a killed run continues on the same loss curve.

``training-<fingerprint>.safetensors`` holds the trained parameters, the optimiser's moments and the best parameters as
tensors, and the step and the history as JSON in the header. The schedule and the random numbers are functions of the
step. One file, written beside and renamed, is always whole: there is no moment in which a kill loses it.

Where whole matrices are trained, the best parameters are a file of their own, ``best-<fingerprint>-<step>``, and take
no memory; that of an earlier step goes once a state that names a later one is there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from saap.base.errors import UserError
from saap.system.sealed_tensors import read_sealed, save_sealed
from saap.tune.loop.processes import like, whole

FORMAT = 2
HEADER = "training"


class About(TypedDict):
    """The JSON part of a state."""

    parts: Mapping[str, object]  # all that the loss curve depends on
    history: dict[str, object]


class Trained:
    """The parameters of an optimiser, their names, and their values when they were best, here or in a file."""

    def __init__(self, names: list[str], optimizer: torch.optim.Optimizer) -> None:
        """``names`` in the order of the optimiser's groups; its parameters may be sharded."""
        self.optimizer = optimizer
        parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.by_name = dict(zip(names, parameters, strict=True))
        self.best: dict[str, torch.Tensor] = {}
        self.file: Path | None = None  # ``best-<fingerprint>`` without a step; None: they stay in memory

    def shapes(self) -> list[list[str | int]]:
        return [[name, *p.shape] for name, p in self.by_name.items()]

    def keep_best(self, step: int, *, writes: bool = True) -> None:
        """Keep the parameters as they are; ``writes``: whether this process does, where they go to a file."""
        if self.file is None:
            self.best = {name: p.detach().clone() for name, p in self.by_name.items()}
            return
        tensors = {name: whole(parameter) for name, parameter in self.by_name.items()}
        if writes:
            write_state(tensors, self._best(step), {})

    @torch.no_grad()
    def put_best(self, step: int) -> None:
        """Put back what was kept after so many steps; training is over then."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()  # memory for the file's pages
        best = self.best if self.file is None else parse_state(self._best(step))[0]
        for name, parameter in self.by_name.items():
            parameter.copy_(best[name] if self.file is None else like(parameter, best[name]))

    def forget_others(self, step: int) -> None:
        """Delete the files of other steps than the best one."""
        if self.file is not None:
            for path in self.file.parent.glob(f"{self.file.name}-*.safetensors"):
                if path != self._best(step):
                    path.unlink(missing_ok=True)

    def _best(self, step: int) -> Path:
        assert self.file is not None
        return self.file.with_name(f"{self.file.name}-{step}.safetensors")

    def mean_gradient(self, factor: float, clip: float | None) -> float:
        """Multiply the gradients, clip the norm of all together to ``clip``; the norm before."""
        for parameter in self.by_name.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        norm = nn.utils.clip_grad_norm_(list(self.by_name.values()), math.inf if clip is None else clip)
        return float(whole(norm))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything, by name, whole and on the CPU; of several processes all have to ask."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.by_name.items():
            tensors[f"trained.{name}"] = whole(parameter)
            if self.file is None:
                tensors[f"best.{name}"] = whole(self.best[name])
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = whole(value)
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what :meth:`tensors` gave."""
        for name, parameter in self.by_name.items():
            parameter.copy_(like(parameter, tensors[f"trained.{name}"]))
            if self.file is None:
                self.best[name] = like(parameter, tensors[f"best.{name}"]).clone()
        for entry, tensor in sorted(tensors.items()):  # sharding is done together, so in the same order everywhere
            kind, _, rest = entry.partition(".")
            if kind == "optimizer":
                key, _, name = rest.partition(".")
                parameter = self.by_name[name]
                # AdamW keeps its count of steps on the CPU.
                self.optimizer.state[parameter][key] = tensor if key == "step" else like(parameter, tensor)


def fingerprint_of(parts: Mapping[str, object]) -> str:
    """sha256 of everything that the loss curve depends on; ``parts`` is JSON."""
    return hashlib.sha256(json.dumps([FORMAT, parts], sort_keys=True).encode()).hexdigest()


def state_directory(out: Path) -> Path:
    """Return the folder that keeps the state of a run until its output ``out`` is there."""
    return out.parent / f".{out.name}.tuning"


def state_path(directory: Path, fingerprint: str) -> Path:
    return directory / f"training-{fingerprint[:16]}.safetensors"


def best_file(state: Path) -> Path:
    """Return where the best parameters of a run with such a state are kept, without the step."""
    return state.with_name(state.stem.replace("training", "best", 1))


def write_state(tensors: Mapping[str, torch.Tensor], path: Path, about: About | Mapping[str, object]) -> None:
    """Write a state, or the best parameters, beside ``path`` and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".*.partial-*"):  # of killed processes: only one run owns the directory
        left.unlink(missing_ok=True)
    try:
        save_sealed(tensors, path, {HEADER: json.dumps(about)})
    except OSError as error:
        raise UserError(f"the state of the training cannot be written to {path} ({error}): make room there") from None


def parse_state(path: Path) -> tuple[dict[str, torch.Tensor], About]:
    """Tensors, mapped, and JSON of a state; UserError where it is damaged."""
    try:
        tensors, header = read_sealed(path)
        return tensors, json.loads(header[HEADER])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the training starts anew") from None


def others_differ_in(path: Path, parts: Mapping[str, object]) -> list[str] | None:
    """Compare with the newest state of another run beside ``path``: the parts that differ; None if there is none."""
    others = [other for other in path.parent.glob("training-*.safetensors") if other != path]
    if not others:
        return None
    newest = max(others, key=lambda other: other.stat().st_mtime)
    try:
        known = parse_state(newest)[1]["parts"]
    except (UserError, KeyError):
        return ["its format"]
    mine = json.loads(json.dumps(parts))
    return sorted(key for key in {*mine, *known} if mine.get(key) != known.get(key))


def discard_states(directory: str | Path) -> None:
    """Delete the states in a directory, and the directory if nothing else is in it; for when the result is written."""
    directory = Path(directory)
    for pattern in ("training-*.safetensors", "best-*.safetensors", ".*.partial-*"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
