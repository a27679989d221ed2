"""Files of a run on a board: the bundles', the bench's own code, perhaps wheels; each by its sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.remote.options import BoardOptions
from bench.runtimes.peers import OTHER_RUNTIMES, bundle_facts, memory_needs, refuse_removed
from devices.transport import BoardError
from export.bundle import Bundle
from export.bundle.manifest import BundleManifest
from export.engine.protocol import check_context
from export.engine.spec import BundleSpec
from export.engine.table import FASTEST, row_of
from saap.base.files import sha256_file

PACKAGES = Path(__file__).resolve().parents[2]
CODE = (
    "bench/**/*.py", "devices/**/*.py", "devices/**/*.toml", "export/__init__.py", "export/bundle/*.py",
    "export/engine/*.py", "saap/__init__.py", "saap/base/*.py",
)  # fmt: skip
REQUIREMENTS = ("msgspec>=0.19", "numpy>=1.26", "onnxruntime>=1.23", "psutil>=5.9")
VENV_BYTES = 300_000_000  # with pip and the packages; 110 MB of it are numpy and onnxruntime on aarch64
ENGINE_BYTES = 600_000_000  # of another engine; llama.cpp is compiled, and takes 500 MB meanwhile
RESERVE_BYTES = 64 << 20  # results, logs, and a system that goes on working

Source = Path | bytes


@dataclass(frozen=True)
class Packed:
    """One spec: the name of its folder, its engine, and its files as relative path -> sha256."""

    spec: str
    name: str
    engine: str | None  # None: ONNX Runtime
    manifest: BundleManifest
    files: dict[str, str]

    @property
    def place(self) -> str:
        """The bundle's name there, below the folder that it is laid out in."""
        return self.name if self.engine is None else f"{self.name}@{self.engine}"

    def memory_needed(self, positions: int) -> int:
        return sum(memory_needs("onnx", bundle_facts(self.manifest), positions, Path(self.name)).values())


@dataclass(frozen=True)
class Shipment:
    """All that one run needs there. ``key`` names the installation, which is made again when any part of it changes."""

    packed: list[Packed]
    sources: dict[str, Source]  # sha256 -> where the bytes are
    code: str  # sha256 of a JSON object, path -> text
    key: str
    requirements: list[str]
    wheels: dict[str, str] | None  # name -> sha256
    own: bool  # a venv of its own, or the board's packages

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, smallest first, so that a mistake in the code shows before a large file is sent."""
        sizes = {sha: len(s) if isinstance(s, bytes) else s.stat().st_size for sha, s in self.sources.items()}
        return dict(sorted(sizes.items(), key=lambda item: item[1]))

    @property
    def agent_bytes(self) -> int:
        others = len(self.requirements) - len(REQUIREMENTS)
        return VENV_BYTES + others * ENGINE_BYTES if self.own else 0

    def install(self) -> dict[str, object]:
        return {
            "key": self.key, "code": self.code, "requirements": self.requirements, "wheels": self.wheels,
            "own": self.own,
        }  # fmt: skip


def pack(specs: Sequence[str], positions: int, options: BoardOptions | None = None) -> Shipment:
    """Check the bundles here and list what they and the agent consist of.

    Args:
        positions: that each bundle's cache must hold.

    Raises:
        BundleError, EngineError: a bundle that cannot be used or does not hold the asked positions.
        BoardError: another runtime than bundles, or no wheels.
    """
    options = options or BoardOptions()
    options.check()
    own, sources = not options.board_packages, dict[str, Source]()
    packed = [_bundle(spec, positions, sources) for spec in specs]
    content = _code()
    sources[code := hashlib.sha256(content).hexdigest()] = content
    engines = sorted({one.engine for one in packed if one.engine is not None})
    requirements = [*REQUIREMENTS, *(row.requirement for row in map(row_of, engines) if row.requirement)]
    named = None if options.wheels is None else _wheels(options.wheels, requirements, sources)
    text = json.dumps([code, requirements, own, sorted((named or {}).items())])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Shipment(packed, sources, code, key, requirements, named, own)


def _bundle(spec: str, positions: int, sources: dict[str, Source]) -> Packed:
    if spec.startswith(OTHER_RUNTIMES):
        raise BoardError(f"{spec} cannot be measured on a board: --on takes bundles and BUNDLE@ENGINE")
    refuse_removed(spec)
    named = BundleSpec.of(spec)
    if named.engine == FASTEST:
        raise BoardError(f"{spec}: the fastest is known for this host alone: name the engines, and see which one is")
    path = named.bundle.resolve()
    bundle = Bundle.open(path).check()
    manifest = bundle.manifest
    named.source(bundle)  # for what it refuses
    check_context(manifest, positions, spec)
    files = bundle.hashes
    sources.update({sha: path / name for name, sha in files.items()})
    return Packed(spec, path.name, named.engine, manifest, files)


def _code() -> bytes:
    files = sorted(path for pattern in CODE for path in PACKAGES.glob(pattern) if "__pycache__" not in path.parts)
    return json.dumps({p.relative_to(PACKAGES).as_posix(): p.read_text(encoding="utf-8") for p in files}).encode()


def _wheels(folder: Path, requirements: Sequence[str], sources: dict[str, Source]) -> dict[str, str]:
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise BoardError(
            f"no wheels in {folder}: fill it with `pip download --only-binary :all: --platform ... -d {folder} "
            f"{' '.join(name.partition('>')[0] for name in requirements)}`"
        )
    named = {path.name: sha256_file(path) for path in wheels}
    sources.update({sha: folder / name for name, sha in named.items()})
    return named
