"""Prices kept by the hash of what they depend on, so that another budget of the same model prices nothing twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from msgspec import msgpack

from saap.base.store import Store
from saap.prune.forms import Place
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan
from saap.prune.scores.cache import key_of
from saap.prune.search.milp import Gap, Library
from saap.prune.search.rounding import Rounding
from saap.system.sealed_tensors import load_sealed, save_sealed

T = TypeVar("T")
STORE = Store("prices", 256 << 20)  # some 20 kB each
NAME = "prices"  # of the only tensor of an entry, whose bytes are MessagePack


@dataclass(frozen=True)
class KeptPrices:
    """An entry: a library without the options, which are made anew."""

    offers: dict[Place, tuple[float, ...]]  # prices of each block's options, in their order
    gaps: tuple[Gap, ...]
    rounding: Rounding | None


def prices_path(weights: str, ids: torch.Tensor, options: PruneOptions, streamed: bool) -> Path:
    """Return the entry for a model's prices, by the hash of its weights and ids [sequences, tokens]."""
    adaptive = asdict(options.adaptive)
    for counted in ("recovered", "most_gone", "measured"):  # by the search
        del adaptive[counted]
    settings = {
        "adaptive": adaptive, "heads": options.heads, "keep": sorted(options.keep), "group": options.least_group,
        "layers": sorted(options.kept_layers), "compensation": options.compensation, "streamed": streamed,
    }  # fmt: skip
    return STORE.folder / f"{key_of(weights, ids, settings)}.safetensors"


def read_library(path: Path, choices: Mapping[Place, Sequence[LayerPlan]], rounded: bool = True) -> Library | None:
    """Read the library of these choices from an entry; None if prices are missing or damaged.

    ``rounded``: prices of integers are wanted, too.
    """

    prices = _read(path, KeptPrices)
    if prices is None or (rounded and prices.rounding is None):
        return None
    plans = {place: len(options) for place, options in choices.items()}
    if plans != {place: len(offers) for place, offers in prices.offers.items()}:
        return None
    offers = {place: tuple(zip(options, prices.offers[place], strict=True)) for place, options in choices.items()}
    return Library(offers, prices.gaps, prices.rounding)


def keep_library(path: Path, library: Library) -> None:
    offers = {place: tuple(price for _, price in offers) for place, offers in library.offers.items()}
    _write(path, KeptPrices(offers, library.gaps, library.rounding))


class KeptDivergences:
    """Measured divergences of a model whose prices are kept at ``path``, by names; kept in a file beside them.

    A search asks in its own order, so that its plan does not depend on what others have measured.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else path.with_suffix(".measured.safetensors")
        self._numbers = (self._path and _read(self._path, dict[str, float])) or {}

    def get(self, name: str) -> float | None:
        return self._numbers.get(name)

    def add(self, divergences: Mapping[str, float]) -> None:
        self._numbers |= divergences
        if self._path is not None:
            _write(self._path, self._numbers)


def _read(path: Path, kind: type[T]) -> T | None:
    """Read an entry; None if there is none, or a damaged one."""
    return STORE.read(path, lambda content: msgpack.decode(load_sealed(content)[0][NAME].numpy().tobytes(), type=kind))


def _write(path: Path, value: object) -> None:
    content = torch.frombuffer(bytearray(msgpack.encode(value)), dtype=torch.uint8)
    STORE.write(path, lambda entry: save_sealed({NAME: content}, entry))
