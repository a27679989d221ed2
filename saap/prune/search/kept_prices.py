"""Prices kept by the hash of what they depend on, so that another budget of the same model prices nothing twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from saap.base.store import Store
from saap.models.slim_quant import MatrixForm
from saap.prune.forms import Place
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan
from saap.prune.scores.cache import key_of
from saap.prune.search.milp import Gap, Library
from saap.prune.search.rounding import Prices, Rounding
from saap.quantize.bundle_size import VOCABULARY
from saap.system.sealed_tensors import load_sealed, save_sealed

STORE = Store("prices", 256 << 20)  # some 20 kB each
OFFERS, GAP, ROUNDED = "offers ", "gap ", "rounding "  # how names begin


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

    def parsed(content: bytes) -> Library:
        tensors, _ = load_sealed(content)
        offers = {
            place: tuple(zip(plans, tensors[OFFERS + _name(place)].tolist(), strict=True))
            for place, plans in choices.items()
        }
        forms = {name: _prices(values) for name, values in tensors.items() if name.startswith(ROUNDED)}
        rounding = None
        if forms or rounded:
            blocks = {place: (forms[_rounded(place, "reads")], forms[_rounded(place, "writes")]) for place in choices}
            rounding = Rounding(blocks, forms[ROUNDED + VOCABULARY])
        gaps = [
            Gap(tuple(map(_place, name.split(" ")[2].split("+"))), float(tensors[name]))
            for name in sorted(tensors)
            if name.startswith(GAP)
        ]
        return Library(offers, tuple(gaps), rounding)

    return STORE.read(path, parsed)


def keep_library(path: Path, library: Library) -> None:
    tensors = {
        OFFERS + _name(place): torch.tensor([price for _, price in offers], dtype=torch.float64)
        for place, offers in library.offers.items()
    }
    for number, gap in enumerate(library.gaps):
        tensors[f"{GAP}{number:06d} " + "+".join(map(_name, gap.blocks))] = torch.tensor(gap.price, dtype=torch.float64)
    if library.rounding is not None:
        for place, both in library.rounding.blocks.items():
            for which, prices in zip(("reads", "writes"), both, strict=True):
                tensors[_rounded(place, which)] = _rows(prices)
        tensors[ROUNDED + VOCABULARY] = _rows(library.rounding.vocabulary)
    STORE.write(path, lambda entry: save_sealed(tensors, entry))


class KeptDivergences:
    """Measured divergences of a model whose prices are kept at ``path``, by names; kept in a file beside them.

    A search asks in its own order, so that its plan does not depend on what others have measured.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else path.with_suffix(".measured.safetensors")
        self._numbers: dict[str, torch.Tensor] = {}
        if self._path is not None and (content := STORE.read(self._path, load_sealed)) is not None:
            self._numbers, _ = content

    def get(self, name: str) -> float | None:
        return float(self._numbers[name]) if name in self._numbers else None

    def add(self, divergences: Mapping[str, float]) -> None:
        self._numbers |= {name: torch.tensor(value, dtype=torch.float64) for name, value in divergences.items()}
        if self._path is not None:
            STORE.write(self._path, lambda entry: save_sealed(self._numbers, entry))


def _rounded(place: Place, which: str) -> str:
    return f"{ROUNDED}{_name(place)} {which}"


def _rows(prices: Prices) -> torch.Tensor:
    """Bits, group size and price of each form, [forms, 3]."""
    rows = [(*form, price) for form, price in prices.items()]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def _prices(rows: torch.Tensor) -> Prices:
    return {MatrixForm(int(bits), int(size)): price for bits, size, price in rows.tolist()}


def _name(place: Place) -> str:
    return f"{place[0]}.{place[1]}"


def _place(name: str) -> Place:
    layer, _, kind = name.partition(".")
    return int(layer), kind
