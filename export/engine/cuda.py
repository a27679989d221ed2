"""A bundle on an NVIDIA GPU by ONNX Runtime: weights, cache, ids, mask and logits stay there between the calls.

Per token one id goes to the GPU and the logits come back, since greedy choice is made on the host; both are part of the
step that is timed, and every call waits for the GPU before it returns, so that a clock around it reads the work and not
its launch. Past and present are one buffer of ``max_length`` positions, as GroupQueryAttention allows.

Where CUDA's libraries do not load, ONNX Runtime falls back to the CPU and only ``get_providers()`` tells; such a
session is refused.

Tried with a fake GPU runtime that computes on the CPU and copies and synchronises as CUDA does, and with
onnxruntime-gpu 1.31 without CUDA's libraries. Never on a GPU: the tests show that buffers, order and masks are right,
not how fast it is.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from export.engine.bound import BoundEngine, as_prompt, zeros
from export.engine.protocol import EngineError, EngineOptions, Ids, Logits
from export.engine.session import EXECUTION, check_provider, check_signature, session_options
from saap.base.errors import first_line

if TYPE_CHECKING:
    import onnxruntime as ort


class CudaEngine(BoundEngine):
    """A bundle on the GPU; the threads are those of the host, which computes shapes only.

    ``runtime``: the onnxruntime module, or another one in its place.

    Raises:
        BundleError: a graph that is not what its manifest says.
        EngineError: not a bundle for cuda, context, threads, or a session that is not on the GPU.
    """

    device = "cuda"

    def __init__(self, source: Path, options: EngineOptions, runtime: ModuleType | None = None) -> None:
        bundle = Bundle.open(source)
        manifest = bundle.manifest
        self._ort = runtime or gpu_runtime()
        check_provider(manifest, "cuda", str(source), runtime=self._ort)
        super().__init__(manifest, source, options)
        self._session = gpu_session(bundle.graph(), options.threads, self._ort)
        check_signature(self._session, manifest, bundle.graph())
        self._bind(self._session)
        try:
            self._allocate()
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EngineError(
                f"a cache of {self.max_length} positions cannot be made on the GPU ({first_line(error)}): ask for less"
            ) from error
        self._bind_cache(self._cache)
        self._binding.bind_ortvalue_output("logits", self._logits)
        self._stepping = False

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions; stale ones are never attended to, so nothing is cleared."""
        self.length = min(length, self.length)
        return self.length

    def versions(self) -> dict[str, str]:
        return {"provider": self._session.get_providers()[0]}

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n] in one call; the logits [vocab] after the last of them."""
        prompt, total = as_prompt(ids, self.manifest), self._with_room_for(len(ids))
        self._stepping = False
        self._binding.bind_ortvalue_input("input_ids", self._on_device(prompt))
        if self._takes_positions:
            positions = np.arange(self.length, total, dtype=np.int64).reshape(1, -1)
            self._binding.bind_ortvalue_input("position_ids", self._on_device(positions))
        return self._run(total)

    def step(self, token_id: int) -> Logits:
        total = self._with_room_for(1)
        if not self._stepping:
            self._bind_step()
        # Bound values of the host would be copied when they are bound and never again.
        self._token.update_inplace(np.array([[token_id]], np.int64))
        if self._takes_positions:
            self._position.update_inplace(np.array([[self.length]], np.int64))
        return self._run(total)

    def _run(self, total: int) -> Logits:
        """Run with the first ``total`` positions of the mask, whose values never change."""
        self._binding.bind_input("attention_mask", self.device, 0, np.int64, (1, total), self._mask.data_ptr())
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EngineError(f"the provider cuda failed: {first_line(error)}{_hint(error)}") from error
        self.length = total
        logits: Logits = self._logits.numpy()[0, 0]
        return logits

    def _allocate(self) -> None:
        self._token = self._on_device(np.zeros((1, 1), np.int64))
        self._position = self._on_device(np.zeros((1, 1), np.int64))
        self._mask = self._on_device(np.ones((1, self.max_length), np.int64))
        self._logits = self._on_device(np.zeros((1, 1, self.manifest.vocab_size), np.float32))
        self._cache = [(part, self._on_device(zeros(part, self.max_length))) for part in self.manifest.cache]

    def _on_device(self, values: NDArray[np.generic]) -> ort.OrtValue:
        return self._ort.OrtValue.ortvalue_from_numpy(values, self.device, 0)

    def _bind_step(self) -> None:
        self._stepping = True
        self._binding.bind_ortvalue_input("input_ids", self._token)
        if self._takes_positions:
            self._binding.bind_ortvalue_input("position_ids", self._position)


def gpu_runtime() -> ModuleType:
    """Import onnxruntime, with CUDA's libraries loaded from pip's packages where they are installed.

    CUDA counts GPUs by speed and NVML by bus; they are made to agree, so that clocks are those of the GPU that runs.
    """
    runtime = import_module("onnxruntime")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if hasattr(runtime, "preload_dlls") and EXECUTION["cuda"] in runtime.get_available_providers():
        with contextlib.redirect_stdout(sys.stderr):
            runtime.preload_dlls()
    return runtime


def gpu_session(graph: Path, threads: int, runtime: ModuleType) -> ort.InferenceSession:
    """Open a graph that was checked on the GPU.

    Raises EngineError: ONNX Runtime refuses the graph, or would run it on the CPU.
    """
    cuda = EXECUTION["cuda"]
    options = session_options(threads, {}, runtime)
    try:
        # Without enable_fallback=0 a provider that fails is replaced by the CPU, which is said on stdout only.
        session = runtime.InferenceSession(
            str(graph), options, providers=[(cuda, {"device_id": "0"})], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise EngineError(
            f"ONNX Runtime {runtime.__version__} cannot run {graph} on {cuda}: {first_line(error)}"
        ) from error
    first = session.get_providers()[0]
    if first != cuda:
        raise EngineError(
            f"ONNX Runtime {runtime.__version__} could not start {cuda} and would run {graph} on {first}: its "
            "libraries (CUDA, cuDNN) are missing or of another version, or there is no GPU; see what ONNX Runtime "
            "wrote before this"
        )
    return session


def _hint(error: Exception) -> str:
    missing = any(text in str(error) for text in ("no kernel image", "invalid device function"))
    return "; this build of ONNX Runtime has no kernels for this GPU, a Jetson needs NVIDIA's own" if missing else ""
