"""What a slim model must meet; together with a model it becomes a :class:`saap.prune.search.budget.Budget`.

* ratio r: weights of the decoder layers at most (1 - r) times the dense model's
* max_params: parameters, embedding and head included
* max_bytes: bytes of the bundle's weights file (:mod:`saap.prune.search.bundle_size`)
* ms_per_token: milliseconds of a decode step by a table that was measured on the device
(:mod:`saap.prune.search.layer_costs`)
* speedup x: milliseconds of a step at most those of the dense model by the table / x
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saap.models.structures import ModelShape
from saap.prune.search.budget import Budget, Measure, StepTime, Weights
from saap.prune.search.bundle_size import BundleSize, bundle_size
from saap.prune.search.layer_costs import CostTable, read_costs
from saap.system.errors import UserError
from saap.system.json_files import read_object

KINDS = ("ratio", "max_params", "max_bytes", "speedup", "ms_per_token")
BITS = (4, 8, 32)
TIMED = ("speedup", "ms_per_token")


@dataclass(frozen=True)
class Requirement:
    """What the slim model must meet: exactly one of the first five.

    Attributes:
        ratio: share of the decoder layers' weights to remove, between 0 and 1.
        max_params: most parameters of the whole model, embedding included.
        max_bytes: most bytes of the bundle's weights file at ``bits`` and ``block``.
        speedup: how many times as fast a decode step must be, by the table of costs.
        ms_per_token: longest decode step in milliseconds, by the table of costs.
        costs: the table, for the last two; from ``saap devices probe --costs``.
        threads: which of the table's thread counts; None takes the only one.
        bits: of the bundle that is planned for: 4, 8 or 32.
        block: its quantisation group.
        onnxruntime: version that the table must be of; None accepts any, for a table brought from another device.
    """

    ratio: float | None = None
    max_params: int | None = None
    max_bytes: int | None = None
    speedup: float | None = None
    ms_per_token: float | None = None
    costs: Path | None = None
    threads: int | None = None
    bits: int = 4
    block: int = 32
    onnxruntime: str | None = None

    @property
    def asked(self) -> dict[str, float]:
        """What was asked, by its name."""
        return {kind: value for kind in KINDS if (value := getattr(self, kind)) is not None}

    def check(self) -> None:
        """Raise UserError for a requirement that is none, two, or out of range."""
        if len(self.asked) != 1:
            found = " and ".join(map(_option, self.asked)) or "none"
            allowed = "--ratio, --max-params, --max-bytes, --speedup or --ms-per-token"
            raise UserError(f"give one requirement: {allowed} (given: {found})")
        ((kind, value),) = self.asked.items()
        self._check_range(kind, value)
        timed = kind in TIMED
        if timed and self.costs is None:
            raise UserError(
                f"{_option(kind)} needs --costs FILE: measure one on the device with `saap devices probe --costs MODEL`"
            )
        for name in ("costs", "threads"):
            if not timed and getattr(self, name) is not None:
                raise UserError(f"{_option(name)} is for --speedup and --ms-per-token: leave it out, or ask for a time")
        if self.bits not in BITS:
            raise UserError(f"{self.bits} bits are not supported; allowed: 4, 8, 32")

    @staticmethod
    def _check_range(kind: str, value: float) -> None:
        name, finite = _option(kind)[2:], math.isfinite(value)
        if kind == "ratio" and not (finite and 0 < value < 1):
            raise UserError(f"ratio {value} is not allowed: give a share between 0 and 1, such as 0.2")
        if kind == "speedup" and not (finite and value > 1):
            raise UserError(f"speedup {value} is not allowed: give a factor above 1, such as 1.25")
        if not (finite and value > 0):
            unit = {"max_params": "parameters", "max_bytes": "bytes", "ms_per_token": "milliseconds"}[kind]
            raise UserError(f"{name} {value} is not allowed: give a positive number of {unit}")

    def budget(self, dense: ModelShape, config: Mapping[str, Any], *, cut: ModelShape | None = None) -> Budget:
        """What the requirement leaves for the layers of a model.

        Args:
            dense: the model that is pruned.
            config: its ``config.json``, of which the bundle's rotary tables are read.
            cut: the same shape with the biases that a slim model of it will have beyond the dense one's.

        Raises:
            UserError: not one requirement, out of range, met by the dense model already, or a table of costs that is
                not of this model.
        """
        self.check()
        ((kind, value),) = self.asked.items()
        size, table, costs = self._size(kind, dense, config), None, None
        if self.costs is not None:
            table = read_costs(
                self.costs, dense, bits=self.bits, block=self.block, threads=self.threads, onnxruntime=self.onnxruntime
            )
            costs = _described(self.costs, table)
        unit, measure = self._measure(kind, size, table)
        budget = Budget(
            unit, math.inf, measure, self.asked, dense, cut or dense, self.bits, self.block, size, table, costs
        )
        whole = budget.total(dense)
        budget = replace(budget, most={"ratio": (1 - value) * whole, "speedup": whole / value}.get(kind, value))
        if budget.meets(dense):
            raise UserError(
                f"the model has {budget.in_words(whole)} already, which meets {budget.in_words(value)}: ask for less"
            )
        return budget

    @staticmethod
    def _measure(kind: str, size: BundleSize | None, table: CostTable | None) -> tuple[str, Measure]:
        """The unit, and what counts in it."""
        if kind == "max_bytes":
            assert size is not None
            return "bytes", size
        if kind in TIMED:
            assert table is not None
            return "ms", StepTime(table)
        return ("weights", Weights(False)) if kind == "ratio" else ("parameters", Weights(True))

    def _size(self, kind: str, dense: ModelShape, config: Mapping[str, Any]) -> BundleSize | None:
        try:
            size = bundle_size(config, self.bits, self.block)
            size.check(dense)
            return size
        except UserError:
            if kind != "max_bytes":  # then the size is a number to report only, and may be unknown
                return None
            raise


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _described(path: Path, table: CostTable) -> dict[str, Any]:
    """Which table, of which device: enough to find it again."""
    device = read_object(path, "measure it again with `saap devices probe --costs`")["device"]
    known = {name: device.get(name) for name in ("board", "cpu_model", "fingerprint", "onnxruntime")}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.name, "sha256": sha256, **known, "threads": table.threads, "depth": table.depth}
