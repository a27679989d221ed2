"""What ``saap run`` is asked for, and what that means for ``saap prune``."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saap.prune.options import REQUIREMENTS

DEFAULT_RATIO = 0.2

TUNE_LENGTH = 256  # tokens of a row


@dataclass(frozen=True)
class RunOptions:
    """``saap run``.

    Attributes:
        ratio, max_params, max_bytes, speedup, ms_per_token: the requirement, at most one of them; without any a ratio
            of 0.2.
        costs: the table that the last two need; at ``threads`` where it holds several counts.
        method, compensate, drop_layers: as in :class:`saap.prune.pruning.PruneOptions`.
        threads: of the bench; None is one, and all physical cores.
    """

    ratio: float | None = None
    max_params: int | None = None
    max_bytes: int | None = None
    speedup: float | None = None
    ms_per_token: float | None = None
    costs: Path | None = None
    method: str = "saap"
    compensate: str | None = None
    drop_layers: int = 0
    calibration: str | None = None
    data: str | None = None
    text: str | None = None
    tokens: int = 24576
    repetitions: int = 6
    threads: int | None = None
    seed: int = 0
    sequences: int = 64
    length: int = 256
    chunk: int = 256
    max_chunks: int = 40

    @property
    def asked(self) -> dict[str, float]:
        """What was asked, by its name; the default where nothing was."""
        given = {kind: value for kind in REQUIREMENTS if (value := getattr(self, kind)) is not None}
        return given or {"ratio": DEFAULT_RATIO}

    def prune_settings(self) -> dict[str, Any]:
        """The options of ``saap prune``."""
        return {
            **self.asked,
            "costs": self.costs,
            "threads": self.threads if self.costs else None,
            "method": self.method,
            "compensate": self.compensate,
            **({"drop_layers": self.drop_layers} if self.drop_layers else {}),
            "calibration": self.calibration,
            "sequences": self.sequences,
            "length": self.length,
            "block": "32",
            "keep_layers": frozenset(),
            "modules": False,
            "seed": self.seed,
        }

    def prune_inputs(self) -> dict[str, str]:
        """What a pruned model depends on beside the dense one: all settings, and what is in the table of costs."""
        settings = {key: str(value) for key, value in self.prune_settings().items()}
        if self.costs is not None:
            settings["costs"] = hashlib.sha256(self.costs.read_bytes()).hexdigest()
        return settings

    def prune_command(self, model: str, out: Path) -> str:
        """What a person would type to prune alone."""
        words = ["saap", "prune", model, "-o", str(out)]
        given: dict[str, Any] = dict(self.asked)
        given |= {"costs": self.costs, "threads": self.threads} if self.costs else {}
        given |= {"method": self.method if self.method != "saap" else None, "compensate": self.compensate}
        given["drop_layers"] = self.drop_layers or None
        for name, value in {**given, "calibration": self.calibration, "seed": self.seed}.items():
            words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
        return shlex.join(words)
