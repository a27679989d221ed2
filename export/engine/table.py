"""The engines: a row for each. Who adds one writes its module and its row (docs/extending.md)."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from export.bundle import Bundle
from export.bundle.manifest import BundleError, BundleManifest
from saap.base.blocks import DeltaHeads, LayerSizes
from saap.base.child import absent
from saap.base.errors import UserError
from saap.base.gguf_header import read_header
from saap.base.interpreters import python_with
from saap.base.tree import text

if TYPE_CHECKING:
    from export.engine.protocol import Engine, EngineOptions  # numpy, which options do without

ONNXRUNTIME, LLAMA_CPP, OPENVINO, GENAI, TORCH = "onnxruntime", "llama.cpp", "openvino", "genai", "torch"
FLASH_ATTENTION = {"flash attention on": 1, "flash attention off": 0}  # the default first; llama_flash_attn_type
FASTEST = "fastest"  # BUNDLE@fastest: the engine that decodes fastest on this device
# What a bundle may have that not every engine reads.
DELTA, SHARED_KEYS, INT8_CACHE = "gated delta nets", "layers that read the keys of others", "an int8 cache (--kv 8)"


@dataclass(frozen=True)
class Row:
    """One engine, and what it needs."""

    name: str  # in BUNDLE@NAME and in --engines
    module: str  # has ``open(source, options)``
    packages: tuple[str, ...]  # that it imports
    install: str  # what to give to pip
    requirement: str | None = None  # what pip installs on a board
    file: str | None = None  # the GGUF file of a bundle that it reads; None: the graph
    inspect: Callable[[Path], object] | None = None  # raises for a file that the engine must not be given
    lacks: tuple[str, ...] = ()  # what it does not read
    cpu_flags: tuple[str, ...] = ()  # of /proc/cpuinfo on x86, without which it does not start
    choices: tuple[str, ...] = ()  # settings of its own that users make for speed; the default first
    environment: tuple[tuple[str, str], ...] = ()  # variables of its process
    anywhere: bool = True  # whether another Python may run it, where SAAP_PEER_PYTHON names one
    of_bundles: bool = True  # whether BUNDLE@NAME runs in it; else its models come as NAME:DIR to the bench

    def source(self, bundle: Bundle) -> Path:
        """Return what it reads of a bundle: the directory, whose graph it opens by itself, or its file there, checked.

        Raises BundleError: it does not run this bundle.
        """
        if self.name != ONNXRUNTIME:
            self._check(bundle.manifest, str(bundle.path))
        bundle.refuse_unlisted()
        source = bundle.file(self.file) if self.file else bundle.path
        if self.inspect is not None:
            self.inspect(source)
        return source

    def _check(self, manifest: BundleManifest, where: str) -> None:
        if manifest.target != "cpu":
            raise BundleError(f"{where} is for {manifest.target}: {self.name} reads bundles of --target cpu")
        self.check_demands(demands_of(manifest.delta, manifest.layers, manifest.kv_dtype == "int8"), where)
        if self.file is not None and self.file not in manifest.files:
            raise BundleError(
                f"{where} has no file for {self.name}: export it with --engines {ONNXRUNTIME},{self.name}"
            )

    def check_demands(self, demands: tuple[str, ...], where: str) -> None:
        """Raise BundleError for what it does not read."""
        if missing := [demand for demand in demands if demand in self.lacks]:
            raise BundleError(f"{where} has {missing[0]}, and {self.name} does not read that: leave {self.name} out")

    def check_cpu(self) -> None:
        """Raise UserError for a CPU that it does not run on; one that lists no flags is not asked."""
        listed = re.search(r"^flags\s*:(.*)$", text(Path("/proc/cpuinfo")) or "", re.MULTILINE)
        if lacking := [flag for flag in self.cpu_flags if listed and flag not in listed[1].split()]:
            raise UserError(f"{self.name} needs a CPU with {lacking[0]}, and this one has none: use another engine")

    def python(self, what: str) -> str:
        """Find the Python that has it; ``what`` is named where there is none. Raises UserError: what to install."""
        self.check_cpu()
        if self.anywhere:
            return python_with(self.packages, what, self.install)
        if missing := absent(self.packages):
            raise UserError(f"{what} needs {missing[0]}, which is not installed: pip install {self.install}")
        return sys.executable

    def here(self) -> bool:
        """Whether this Python has it."""
        return not absent(self.packages)

    def check_here(self) -> None:
        """Raise UserError for an engine that this Python does not have."""
        self.check_cpu()
        if not self.here():
            raise UserError(f"{self.name} is not in this Python, and it is needed here: pip install {self.install}")

    def process_environment(self, threads: int) -> dict[str, str]:
        """Variables of a process that runs it. After a failed assertion ggml would start a debugger."""
        common = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
        return {**common, **dict(self.environment)}

    def open(self, source: Path, options: EngineOptions) -> Engine:
        """Load a model in this process."""
        engine: Engine = import_module(self.module).open(source, options)
        return engine


# PyTorch's OpenMP threads that spin while idle slow their neighbours; llama.cpp's wait as its builders chose.
QUIET = (("OMP_WAIT_POLICY", "passive"), ("TRANSFORMERS_VERBOSITY", "error"), ("TRANSFORMERS_OFFLINE", "1"))
ROWS = (
    Row(ONNXRUNTIME, "export.engine.onnxruntime", ("onnxruntime",), "onnxruntime", anywhere=False),
    Row(
        LLAMA_CPP, "export.engine.llama_cpp", ("llama_cpp",), "llama-cpp-python",
        "llama-cpp-python>=0.3.36", file="model.gguf", inspect=read_header, choices=tuple(FLASH_ATTENTION),
    ),
    Row(
        OPENVINO, "export.engine.openvino", ("openvino",), "openvino", "openvino>=2026.1",
        lacks=(DELTA, SHARED_KEYS, INT8_CACHE), cpu_flags=("sse4_2",),
    ),
    Row(GENAI, "export.engine.genai", ("onnxruntime_genai",), "onnxruntime-genai", of_bundles=False),
    Row(
        TORCH, "export.engine.torch", ("torch", "transformers"), "torch transformers", environment=QUIET,
        anywhere=False, of_bundles=False,
    ),
)  # fmt: skip


def row_of(name: str) -> Row:
    """Return the engine of this name. Raises KeyError: there is none."""
    return next(row for row in ROWS if row.name == name)


def bundle_engines() -> tuple[str, ...]:
    """Names that BUNDLE@NAME and --engines take."""
    return tuple(row.name for row in ROWS if row.of_bundles)


def demands_of(delta: DeltaHeads | None, layers: Iterable[LayerSizes], int8_cache: bool) -> tuple[str, ...]:
    """List what an engine must read to run a bundle."""
    present = {
        DELTA: delta is not None,
        SHARED_KEYS: any(layer.reads for layer in layers),
        INT8_CACHE: int8_cache,
    }
    return tuple(demand for demand, needed in present.items() if needed)


def engines_in(manifest: BundleManifest) -> list[str]:
    """List the engines that a bundle was made for."""
    exported = manifest.lineage.get("engines") or {}
    others = (row for row in ROWS if row.of_bundles and row.name != ONNXRUNTIME)
    return [
        ONNXRUNTIME,
        *(row.name for row in others if (row.file in manifest.files if row.file else row.name in exported)),
    ]
