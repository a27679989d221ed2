"""A bare ONNX Runtime loop over a bundle: what the bench's decode is measured against.

    python -m studies.bench.bare_loop BUNDLE PROMPT GENERATE THREADS CPU,CPU

Prints tokens per second of GENERATE greedy steps. Nothing but numpy and onnxruntime does the work; huge pages are asked
for as the bench asks, since they belong to the process and not to the loop.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

WARM_UP = 24


def main(bundle: str, prompt: int, generate: int, threads: int, cpus: list[int]) -> None:
    from export.engine.huge_pages import with_huge_pages

    os.sched_setaffinity(0, cpus)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    session, _ = with_huge_pages(
        lambda: ort.InferenceSession(f"{bundle}/model.onnx", options, providers=["CPUExecutionProvider"]),
        Path(f"{bundle}/model.onnx.data").stat().st_size,
    )
    binding, length = session.io_binding(), prompt + generate + WARM_UP
    for value in session.get_inputs():
        if value.name.startswith("past"):
            kind = {"tensor(float)": np.float32, "tensor(int8)": np.int8}[value.type]
            cache = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, value.shape[1], length, value.shape[3]), kind))
            binding.bind_ortvalue_input(value.name, cache)
            binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), cache)
    vocabulary = next(o.shape[-1] for o in session.get_outputs() if o.name == "logits")
    logits, mask = np.empty((1, 1, vocabulary), np.float32), np.ones((1, length), np.int64)
    binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def run(ids: np.ndarray, total: int) -> None:
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), mask.ctypes.data)
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        session.run_with_iobinding(binding)

    words, token = np.random.default_rng(0).integers(vocabulary, size=(1, prompt)), np.zeros((1, 1), np.int64)
    for steps in (WARM_UP, generate):
        run(words, prompt)
        token[0, 0] = logits.argmax()
        start = time.perf_counter()
        for step in range(steps):
            run(token, prompt + step + 1)
            token[0, 0] = logits.argmax()
        seconds = time.perf_counter() - start
    print(generate / seconds)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), [int(cpu) for cpu in sys.argv[5].split(",")])
