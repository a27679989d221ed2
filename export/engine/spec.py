"""``BUNDLE``, ``BUNDLE@llama.cpp`` and ``BUNDLE@fastest``: a bundle, and the engine that runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from export.bundle import Bundle
from export.bundle.manifest import BundleError
from export.engine.table import FASTEST, ONNXRUNTIME, Row, bundle_engines, row_of
from saap.base.progress import Progress


@dataclass(frozen=True)
class BundleSpec:
    """A bundle, and the engine that is named with it; None where none is named."""

    bundle: Path
    engine: str | None = None

    @classmethod
    def of(cls, spec: str | Path) -> BundleSpec:
        """Split a spec; a path that exists may have an @ of its own.

        Raises BundleError: an engine that is not known.
        """
        text = str(spec)
        bundle, at, engine = text.rpartition("@")
        if not at or Path(text).exists() or "/" in engine or not Path(bundle).exists():
            return cls(Path(text))
        known = (*bundle_engines(), FASTEST)
        if engine not in known:
            raise BundleError(f"{text}: there is no engine {engine!r}: {', '.join(known)} are known")
        return cls(Path(bundle), engine)

    def __str__(self) -> str:
        return str(self.bundle) if self.engine is None else f"{self.bundle}@{self.engine}"

    @property
    def row(self) -> Row:
        """The engine; ONNX Runtime where none is named."""
        return row_of(self.engine or ONNXRUNTIME)

    def source(self, bundle: Bundle) -> Path:
        """Return what the engine reads of the opened bundle. Raises BundleError: it does not run this bundle."""
        return self.row.source(bundle)


def resolve(spec: str | Path, progress: Progress | None = None, *, here: bool = False) -> BundleSpec:
    """Find the bundle and the engine that a spec names; for ``@fastest`` the one that is fastest on this device.

    Args:
        progress: told what is measured and found, where the answer is not known yet.
        here: the engine has to be in this Python, not in one of its own.

    Raises UserError: no such bundle, or its engines cannot be compared.
    """
    named = BundleSpec.of(spec)
    if named.engine != FASTEST:
        return named
    from export.engine.fastest import fastest_engine

    return replace(named, engine=fastest_engine(named.bundle, progress, here=here))
