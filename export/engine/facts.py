"""Sizes of a measured model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from export.bundle.manifest import Spelling
from saap.base.caches import GROWING, Sliding


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the measured model; None is unknown."""

    parameters: int | None = None
    model_bytes: int | None = None  # files on disk that hold weights and graph
    weight_bytes_per_token: int | None = None
    kv_bytes_per_token: int | None = None
    bits: int | None = None
    vocab_size: int | None = None
    unknown: dict[str, str] = field(default_factory=dict)
    sliding: Sliding = GROWING  # of the cache
    spelling: Spelling | None = None  # in how many tokens it says a text


SIZES = ("parameters", "model_bytes", "weight_bytes_per_token", "kv_bytes_per_token", "bits")


def file_facts(*files: Path) -> ModelFacts:
    """Facts of a model that is no bundle of ours: the size of its files."""
    unknown = {name: "the graph is not unpacked to count it" for name in SIZES if name != "model_bytes"}
    return ModelFacts(model_bytes=sum(file.stat().st_size for file in files), unknown=unknown)
