"""Prices kept by the hash of what they depend on, so that another budget of the same model prices nothing twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from saap.base.files import cache_directory, make_room
from saap.models.slim_quant import MatrixForm
from saap.prune.forms import Place
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan
from saap.prune.scores.cache import key_of
from saap.prune.search.milp import Gap, Library
from saap.prune.search.rounding import Prices, Rounding
from saap.quantize.bundle_size import VOCABULARY
from saap.system.sealed_tensors import load_sealed, save_sealed

KEPT_BYTES = 256 << 20  # of all entries, some 20 kB each; those unused longest go
OFFERS, GAP, ROUNDED = "offers ", "gap ", "rounding "  # how names begin


def prices_path(weights: str, ids: torch.Tensor, options: PruneOptions, streamed: bool) -> Path:
    """Where the prices of a model by the hash of its weights on ids [sequences, tokens] are kept."""
    adaptive = asdict(options.adaptive)
    for counted in ("recovered", "most_gone", "measured"):  # by the search
        del adaptive[counted]
    settings = {
        "adaptive": adaptive, "heads": options.heads, "keep": sorted(options.keep), "group": options.least_group,
        "layers": sorted(options.kept_layers), "compensation": options.compensation, "streamed": streamed,
    }  # fmt: skip
    return cache_directory() / "prices" / f"{key_of(weights, ids, settings)}.safetensors"


def read_library(path: Path, choices: Mapping[Place, Sequence[LayerPlan]], rounded: bool = True) -> Library | None:
    """The library of these choices at the prices kept there; None where some are missing, or none can be read.

    ``rounded``: prices of integers are wanted, too.
    """
    if not path.is_file():
        return None
    try:
        kept, _ = load_sealed(path.read_bytes())
        offers = {
            place: tuple(zip(plans, kept[OFFERS + _name(place)].tolist(), strict=True))
            for place, plans in choices.items()
        }
        held = {name: _prices(values) for name, values in kept.items() if name.startswith(ROUNDED)}
        rounding = None
        if held or rounded:
            blocks = {place: (held[_rounded(place, "reads")], held[_rounded(place, "writes")]) for place in choices}
            rounding = Rounding(blocks, held[ROUNDED + VOCABULARY])
        gaps = [
            Gap(tuple(map(_place, name.split(" ")[2].split("+"))), float(kept[name]))
            for name in sorted(kept)
            if name.startswith(GAP)
        ]
    except (OSError, KeyError, ValueError):
        return None
    path.touch()
    return Library(offers, tuple(gaps), rounding)


def keep_library(path: Path, library: Library) -> None:
    """Write its prices; others that were unused longest make room. A cache that cannot be written costs time only."""
    kept = {
        OFFERS + _name(place): torch.tensor([price for _, price in offers], dtype=torch.float64)
        for place, offers in library.offers.items()
    }
    for number, gap in enumerate(library.gaps):
        kept[f"{GAP}{number:06d} " + "+".join(map(_name, gap.blocks))] = torch.tensor(gap.price, dtype=torch.float64)
    if library.rounding is not None:
        for place, both in library.rounding.blocks.items():
            for which, prices in zip(("reads", "writes"), both, strict=True):
                kept[_rounded(place, which)] = _told(prices)
        kept[ROUNDED + VOCABULARY] = _told(library.rounding.vocabulary)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sealed(kept, path)
        make_room(path.parent, KEPT_BYTES - path.stat().st_size, path)


class KeptDivergences:
    """What was measured of a model whose prices are kept at ``path``, by names; kept in a file beside them.

    A search asks in its own order, so that its plan does not depend on what others have measured.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else path.with_suffix(".measured.safetensors")
        self._found: dict[str, torch.Tensor] = {}
        if self._path is not None and self._path.is_file():
            with suppress(OSError, ValueError):
                self._found = load_sealed(self._path.read_bytes())[0]
                self._path.touch()

    def get(self, name: str) -> float | None:
        return float(self._found[name]) if name in self._found else None

    def add(self, found: Mapping[str, float]) -> None:
        """A cache that cannot be written costs time only."""
        self._found |= {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
        if self._path is not None:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                save_sealed(self._found, self._path)


def _rounded(place: Place, which: str) -> str:
    return f"{ROUNDED}{_name(place)} {which}"


def _told(prices: Prices) -> torch.Tensor:
    """Bits, group size and price of each form, [forms, 3]."""
    rows = [(*form, price) for form, price in prices.items()]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def _prices(told: torch.Tensor) -> Prices:
    return {MatrixForm(int(bits), int(size)): price for bits, size, price in told.tolist()}


def _name(place: Place) -> str:
    return f"{place[0]}.{place[1]}"


def _place(name: str) -> Place:
    layer, _, kind = name.partition(".")
    return int(layer), kind
