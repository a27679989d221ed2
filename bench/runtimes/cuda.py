"""A bundle on an NVIDIA GPU by ONNX Runtime: weights, cache, ids, mask and logits stay there between the calls.

Per token one id goes to the GPU and the logits come back, since greedy choice is made on the host; both are part of the
step that is timed, and every call waits for the GPU before it returns, so that a clock around it reads the work and not
its launch.

* ``cuda``: past and present are one buffer of ``max_length`` positions, as GroupQueryAttention allows.
* ``cuda`` with a CUDA graph: the step is captured when it runs first and replayed from then on, which needs shapes and
  addresses that never change. So the mask has ``max_length`` positions, of which those in use are 1 (the count of ones
  is what attention reads on the GPU); a prompt, whose length changes, is not captured. ONNX Runtime runs the first
  step several times to capture it, all of them with the same result.
* ``tensorrt``: standard operators concatenate the cache, so past and present are two buffers that take turns. TensorRT
  cannot start from an empty cache; it gets one position that the mask hides, and position ids that do not count it.

Tried with a fake GPU runtime that computes on the CPU and copies, synchronises and replays as CUDA does. Never on a
GPU: what the tests show is that buffers, order and masks are right, not how fast it is.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.runtimes.providers import MASKED, GpuSession, gpu_runtime, provider_options
from export.bundle.decoder import BundleDecoder, Ids, Logits, as_prompt
from export.bundle.manifest import DECODE_GRAPH, read_manifest
from export.bundle.session import DecoderError, check_provider, check_signature
from saap.base.errors import first_line

if TYPE_CHECKING:
    import onnxruntime as ort

NOT_CAPTURED, STEP = "-1", "1"  # of the run option gpu_graph_id


class DeviceDecoder(BundleDecoder):
    """A decoder on the GPU.

    Args:
        threads: of ONNX Runtime on the host, which computes shapes only.
        provider: cuda or tensorrt.
        cuda_graph: replay decode steps as a CUDA graph; cuda only.
        runtime: the onnxruntime module, or another one in its place.

    Raises:
        BundleError: the bundle does not verify.
        DecoderError: bundle and provider do not fit, context, threads, or a session that is not on the GPU.
    """

    device = "cuda"  # where TensorRT's buffers are, too

    def __init__(
        self,
        bundle_dir: str | Path,
        threads: int,
        max_length: int,
        provider: str,
        *,
        cuda_graph: bool = False,
        runtime: ModuleType | None = None,
    ) -> None:
        directory = Path(bundle_dir)
        manifest = read_manifest(directory)
        self._ort = runtime or gpu_runtime()
        check_provider(manifest, provider, str(directory), cuda_graph=cuda_graph, runtime=self._ort)
        super().__init__(manifest, directory, threads, max_length)
        self.provider, self._graph = provider, cuda_graph
        providers = provider_options(manifest, provider, max_length, cuda_graph)
        self.gpu = GpuSession(directory / DECODE_GRAPH, threads, providers, self._ort)
        check_signature(self.gpu.session, manifest, directory / DECODE_GRAPH)
        self._bind(self.gpu.session)
        self._shared = provider == "cuda"
        self._hidden = 0 if self._shared else MASKED
        try:
            self._allocate()
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise DecoderError(
                f"a cache of {max_length} positions cannot be made on the GPU ({first_line(error)}): ask for less"
            ) from error
        self._start()

    def reset(self) -> None:
        """Forget the sequence; stale positions are never attended to, so the buffer is not cleared."""
        if self.length:
            self.gpu.sequence_ended()
        self._start()

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n] in one call; the logits [vocab] after the last of them."""
        prompt, total = as_prompt(ids, self.manifest), self._with_room_for(len(ids))
        self._stepping = False
        self._binding.bind_ortvalue_input("input_ids", self._on_device(prompt))
        if self._takes_positions:
            positions = np.arange(self.length, total, dtype=np.int64).reshape(1, -1)
            self._binding.bind_ortvalue_input("position_ids", self._on_device(positions))
        self._show_mask(total)
        return self._run(total, self._eager)

    def step(self, token_id: int) -> Logits:
        total = self._with_room_for(1)
        if not self._stepping:
            self._bind_step()
        # Bound values of the host would be copied when they are bound and never again.
        self._token.update_inplace(np.array([[token_id]], np.int64))
        if self._takes_positions:
            self._position.update_inplace(np.array([[self.length]], np.int64))
        if self._graph:
            self._mask_values[0, self.length] = 1
            self._mask.update_inplace(self._mask_values)
        else:
            self._show_mask(total)
        return self._run(total, self._captured)

    def _run(self, total: int, options: ort.RunOptions | None) -> Logits:
        if not self._shared:
            self._free_outputs()
        try:
            self.gpu.session.run_with_iobinding(self._binding, options)
            self._binding.synchronize_outputs()
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise DecoderError(f"the provider {self.provider} failed: {first_line(error)}{_hint(error)}") from error
        self.length = total
        if not self._shared:
            self._carry_cache()
        logits: Logits = self._logits.numpy()[0, 0]
        return logits

    def _allocate(self) -> None:
        capacity = self._hidden + self.max_length
        self._token = self._on_device(np.zeros((1, 1), np.int64))
        self._position = self._on_device(np.zeros((1, 1), np.int64))
        shown = np.ones((1, capacity), np.int64)
        shown[:, : self._hidden] = 0
        self._shown = self._on_device(shown)
        self._mask_values = np.zeros((1, self.max_length), np.int64)
        self._mask = self._on_device(self._mask_values)  # of the CUDA graph
        self._logits = self._on_device(np.zeros((1, 1, self.manifest.vocab_size), np.float32))
        self._eager = self._options(NOT_CAPTURED) if self._graph else None
        self._captured = self._options(STEP) if self._graph else None
        self._cache = self._zero_cache(self.max_length if self._shared else MASKED, self._on_device)

    def _on_device(self, values: NDArray[np.generic]) -> ort.OrtValue:
        return self._ort.OrtValue.ortvalue_from_numpy(values, self.device, 0)

    def _options(self, graph_id: str) -> ort.RunOptions:
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph_id)
        return options

    def _start(self) -> None:
        """Bind an empty cache."""
        self.length = 0
        self._stepping = False
        self._mask_values[:] = 0
        self._bind_cache(self._cache)
        if not self._shared:
            self._free_outputs()  # before the logits: _carry_cache counts on it
        self._binding.bind_ortvalue_output("logits", self._logits)

    def _bind_step(self) -> None:
        self._stepping = True
        self._binding.bind_ortvalue_input("input_ids", self._token)
        if self._takes_positions:
            self._binding.bind_ortvalue_input("position_ids", self._position)
        if self._graph:
            self._mask_values[0, : self.length] = 1
            self._binding.bind_ortvalue_input("attention_mask", self._mask)

    def _show_mask(self, total: int) -> None:
        """Bind the first positions of the mask, whose values never change."""
        size = self._hidden + total
        self._binding.bind_input("attention_mask", self.device, 0, np.int64, (1, size), self._shown.data_ptr())


def _hint(error: Exception) -> str:
    missing = any(text in str(error) for text in ("no kernel image", "invalid device function"))
    return "; this build of ONNX Runtime has no kernels for this GPU, a Jetson needs NVIDIA's own" if missing else ""
