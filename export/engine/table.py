"""The engines that run a bundle: ONNX Runtime and OpenVINO its graph, llama.cpp a file of the same weights beside it.

``BUNDLE@llama.cpp`` names a bundle and the engine that shall run it, ``BUNDLE@fastest`` the one that is fastest here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.bundle.manifest import BundleError, BundleManifest, read_manifest

ONNXRUNTIME, LLAMA_CPP, OPENVINO, FASTEST = "onnxruntime", "llama.cpp", "openvino", "fastest"
FILES = {LLAMA_CPP: "model.gguf"}  # of the engines that do not read the graph
PACKAGES = {LLAMA_CPP: ("llama_cpp",), OPENVINO: ("openvino",)}
EXTRAS = {LLAMA_CPP: "'saap[llama-cpp]'", OPENVINO: "'saap[openvino]'"}
REQUIREMENTS = {LLAMA_CPP: "llama-cpp-python>=0.3.36", OPENVINO: "openvino>=2026.1"}
ENGINES = (ONNXRUNTIME, LLAMA_CPP, OPENVINO)


@dataclass(frozen=True)
class Placed:
    """A bundle and what runs it; ``engine`` is None where the spec names none."""

    bundle: Path
    engine: str | None

    @classmethod
    def of(cls, spec: str | Path) -> Placed:
        """What a spec names; a path that is there may have an @ of its own.

        Raises BundleError: an engine that is not known.
        """
        text = str(spec)
        before, at, engine = text.rpartition("@")
        if not at or Path(text).exists() or "/" in engine or not Path(before).exists():
            return cls(Path(text), None)
        if engine not in (*ENGINES, FASTEST):
            raise BundleError(f"{text}: there is no engine {engine!r}: {', '.join((*ENGINES, FASTEST))} are known")
        return cls(Path(before), engine)

    def file(self) -> Path:
        """What the engine reads: the bundle's directory, or the file of another engine.

        Raises BundleError: the bundle was not made for it.
        """
        if self.engine == OPENVINO:
            check_openvino(read_manifest(self.bundle), str(self.bundle))
        if self.engine not in FILES:
            return self.bundle
        manifest = read_manifest(self.bundle)
        if FILES[self.engine] not in manifest.files:
            raise BundleError(
                f"{self.bundle} has no file for {self.engine}: export it with --engines onnxruntime,{self.engine}"
            )
        return self.bundle / FILES[self.engine]


def check_openvino(manifest: BundleManifest, where: str) -> None:
    """Raise BundleError: OpenVINO does not read the graph."""
    if any(layer.reads for layer in manifest.layers):
        raise BundleError(f"{where} has layers that read others' keys and values, which was not tried in OpenVINO")
    if manifest.delta is not None:
        raise BundleError(f"{where} has gated delta nets, whose operator OpenVINO does not read: leave openvino out")
    if manifest.target != "cpu" or manifest.kv_dtype != "float32":
        made = f"{manifest.target} with a {manifest.kv_dtype} cache"
        raise BundleError(f"{where} is for {made}; OpenVINO reads bundles of --target cpu with --kv 32")


def engines_in(manifest: BundleManifest) -> list[str]:
    """The engines that a bundle was made for."""
    told = manifest.lineage.get("engines") or {}
    return [ONNXRUNTIME, *(e for e in ENGINES[1:] if (FILES[e] in manifest.files if e in FILES else e in told))]
