"""Execution providers of ONNX Runtime: which bundle fits which, how a GPU session is opened, and what ran where.

ONNX Runtime falls back without a word. Where a provider's libraries do not load, the session is made on the CPU and
only ``get_providers()`` tells; single nodes without a kernel go to the CPU, and nothing tells. So a session that did
not get its provider is refused, and the nodes are counted: ``get_provider_graph_assignment_info`` of newer ONNX
Runtimes says where each is, older ones (1.23 on JetPack 6) write it into the profile of the first sequence.
``session.disable_cpu_ep_fallback`` is no answer: it refuses every decoder, since ONNX Runtime computes shapes (the
length of the mask) on the CPU on purpose. Those nodes are not counted as a fallback.

Tried on a fake GPU runtime in the tests, and without one on real ones: onnxruntime's own fallback on a CPU, and
onnxruntime-gpu 1.31 without CUDA's libraries. Never on a GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from export.bundle.graph_check import check_graph
from export.bundle.manifest import BundleManifest
from export.bundle.session import EXECUTION, DecoderError, session_options
from saap.base.errors import first_line
from saap.base.files import cache_directory

if TYPE_CHECKING:
    import onnxruntime as ort

Providers = list[tuple[str, dict[str, str]]]  # in their order, with options
MASKED = 1  # positions before the sequence in a TensorRT cache: an optimisation profile cannot begin at none

# Arithmetic on lengths and positions, which ONNX Runtime places on the CPU beside any provider.
SHAPE_OPERATORS = frozenset([
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Expand", "Gather", "Identity", "MemcpyFromHost",
    "MemcpyToHost", "Mul", "Range", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub",
    "Unsqueeze",
])  # fmt: skip
_ASSIGNMENT = "get_provider_graph_assignment_info"


@dataclass(frozen=True)
class ProviderFacts:
    """What a session ran on. ``nodes`` counts the graph's nodes per provider, None where it was not asked."""

    asked: str
    active: str  # the first of the providers that the session has
    nodes: dict[str, int] | None = None
    on_cpu: tuple[str, ...] = ()  # operators that computed on the CPU although another provider was asked for

    @property
    def fallback(self) -> bool:
        """Another provider than the one asked for did (part of) the work. CUDA under TensorRT is declared, so none."""
        unused = self.nodes is not None and not self.nodes.get(self.asked)
        return self.active != self.asked or bool(self.on_cpu) or unused


def gpu_runtime() -> ModuleType:
    """The onnxruntime module, with CUDA's libraries loaded from pip's packages where they are there.

    CUDA counts GPUs by speed and NVML by bus; they are made to agree, so that clocks are those of the GPU that runs.
    """
    runtime = import_module("onnxruntime")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if hasattr(runtime, "preload_dlls") and EXECUTION["cuda"] in runtime.get_available_providers():
        with contextlib.redirect_stdout(sys.stderr):
            runtime.preload_dlls()
    return runtime


class GpuSession:
    """A session on a GPU, and the record of where its nodes are.

    Raises:
        BundleError: weights outside the graph's folder, or none there.
        DecoderError: ONNX Runtime refuses the graph, or would run it on another provider.
    """

    def __init__(self, graph: Path, threads: int, providers: Providers, runtime: ModuleType) -> None:
        check_graph(graph)
        self._profiles: tempfile.TemporaryDirectory[str] | None = None
        self._placed: dict[str, Counter[str]] | None = None
        options = session_options(threads, {"session.record_ep_graph_assignment_info": "1"}, runtime)
        if not hasattr(runtime.InferenceSession, _ASSIGNMENT):
            self._profiles = tempfile.TemporaryDirectory(prefix="saap-profile-")
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._profiles.name) / "nodes")
        asked = providers[0][0]
        try:
            # Without enable_fallback=0 a provider that fails is replaced by the CPU, which is said on stdout only.
            self.session = runtime.InferenceSession(str(graph), options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise DecoderError(
                f"ONNX Runtime {runtime.__version__} cannot run {graph} on {asked}: {first_line(error)}"
            ) from error
        got = self.session.get_providers()
        if got[0] != asked:
            raise DecoderError(
                f"ONNX Runtime {runtime.__version__} could not start {asked} and would run {graph} on {got[0]}: its "
                "libraries (CUDA, cuDNN, TensorRT) are missing or of another version, or there is no GPU; see what "
                "ONNX Runtime wrote before this"
            )

    def sequence_ended(self) -> None:
        """Stop profiling, where the nodes have to be read from a profile: it costs time and must not be measured."""
        if self._profiles is None:
            return
        events = json.loads(Path(self.session.end_profiling()).read_text(encoding="utf-8"))
        self._placed = placed_by_profile(events)
        self._profiles.cleanup()
        self._profiles = None

    def facts(self, asked: str) -> ProviderFacts:
        """What ran where, in our names; at least one run must have been made."""
        self.sequence_ended()
        placed = _placed_by_session(self.session) if self._placed is None else self._placed
        names = {execution: name for name, execution in EXECUTION.items()}
        first = self.session.get_providers()[0]
        return ProviderFacts(
            asked,
            names.get(first, first),
            {names.get(execution, execution): sum(count.values()) for execution, count in placed.items()},
            tuple(sorted(set(placed.get(EXECUTION["cpu"], ())) - SHAPE_OPERATORS)),
        )


def placed_by_profile(events: Iterable[dict[str, object]]) -> dict[str, Counter[str]]:
    """Provider -> operator -> number of different nodes in the events of a profile, however often each ran."""
    seen = set()
    for event in events:
        arguments = event.get("args")
        if event.get("cat") == "Node" and isinstance(arguments, dict) and arguments.get("provider"):
            seen.add((event["name"], arguments["provider"], arguments.get("op_name", "?")))
    return _counted((provider, operator) for _, provider, operator in seen)


def _placed_by_session(session: ort.InferenceSession) -> dict[str, Counter[str]]:
    subgraphs = session.get_provider_graph_assignment_info()
    return _counted((part.ep_name, node.op_type) for part in subgraphs for node in part.get_nodes())


def _counted(nodes: Iterable[tuple[str, str]]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for provider, operator in nodes:
        counts.setdefault(provider, Counter())[operator] += 1
    return counts


def provider_options(manifest: BundleManifest, provider: str, max_length: int, cuda_graph: bool) -> Providers:
    """Providers of a GPU session; ``max_length`` is the positions of the cache."""
    cuda = (EXECUTION["cuda"], {"device_id": "0", **({"enable_cuda_graph": "1"} if cuda_graph else {})})
    if provider == "cuda":
        return [cuda]
    options = {
        "device_id": "0",
        "trt_fp16_enable": "True",  # this provider reads True and False, not 1 and 0
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(engine_directory(manifest, max_length)),
        **profile_shapes(manifest, max_length),
    }
    return [(EXECUTION["tensorrt"], options), cuda]


def engine_directory(manifest: BundleManifest, max_length: int) -> Path:
    """Where TensorRT keeps the engines of a bundle, which it builds for minutes; made if it is missing."""
    key = f"{manifest.content_hash}-{max_length}"
    directory = cache_directory() / "tensorrt" / hashlib.sha256(key.encode()).hexdigest()[:24]
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def profile_shapes(manifest: BundleManifest, max_length: int) -> dict[str, str]:
    """TensorRT's optimisation profile: the smallest, usual and largest size of every input of a portable graph.

    Tuned for decode (one token, the cache half full). A prefill runs in the same engine, slower than one of its own
    would be. Sizes are positive, which TensorRT demands: the cache starts with ``MASKED`` positions.
    """
    sizes = {  # (new tokens, positions in the cache before them)
        "min": (1, MASKED),
        "opt": (1, MASKED + max_length // 2),
        "max": (max_length, MASKED + max_length - 1),
    }
    return {f"trt_profile_{bound}_shapes": _shapes(manifest, new, past) for bound, (new, past) in sizes.items()}


def _shapes(manifest: BundleManifest, new: int, past: int) -> str:
    # The lengths must add up, or TensorRT refuses the profile.
    shapes = [f"input_ids:1x{new}", f"attention_mask:1x{past + new}", f"position_ids:1x{new}"]
    shapes += [f"{part.past}:{'x'.join(map(str, part.sized(1, past)))}" for part in manifest.cache]
    return ",".join(shapes)
