"""A GGUF file in llama.cpp: the library's own decode call through ctypes, token by token.

llama-cpp-python's ``Llama`` class copies logits and samples in Python; here a step is one ``llama_decode``, and the
logits are a view of the library's buffer. Context options are the library's defaults, except for lengths, threads and
flash attention, where that is said.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from export.engine.huge_pages import with_huge_pages
from export.engine.onnxruntime import Ids, Logits

if TYPE_CHECKING:
    from llama_cpp.llama_cpp import llama_batch, llama_context_params

T = TypeVar("T")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
FLASH_ATTENTION = {"flash attention on": 1, "flash attention off": 0}  # the default first; llama_flash_attn_type


class LlamaCppDecoder:
    """A GGUF file in llama.cpp behind the ``Decoder`` protocol.

    Args:
        max_length: positions of the cache; llama.cpp rounds them up to its own granularity.
        choice: of ``FLASH_ATTENTION``; None is the library's own, which is on for a CPU.
        huge_pages: move the weights there, as llama.cpp does not.
    """

    def __init__(
        self, path: Path, threads: int, max_length: int, choice: str | None = None, *, huge_pages: bool = False
    ) -> None:
        from llama_cpp import llama_cpp

        self.lib: ModuleType = llama_cpp
        self.path, self.max_length = path, max_length
        self._errors: list[str] = []
        self._callback = _listen(llama_cpp, self._errors)  # the library calls it as long as we decode
        llama_cpp.llama_backend_init()
        on_cpu = llama_cpp.llama_model_default_params()
        on_cpu.n_gpu_layers = 0
        self.model, self.huge_page_bytes = with_huge_pages(
            lambda: self._checked(llama_cpp.llama_model_load_from_file(str(path).encode(), on_cpu)),
            path.stat().st_size if huge_pages else 0,
        )
        self.options = self._context_options(threads, max_length)
        if choice is not None:
            self.options.flash_attn_type = FLASH_ATTENTION[choice]
        self.context = self._checked(llama_cpp.llama_init_from_model(self.model, self.options))
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)))
        self._token = (llama_cpp.llama_token * 1)()
        self._one = llama_cpp.llama_batch_get_one(self._token, 1)
        self._address, self._logits = 0, np.empty(0, np.float32)

    def reset(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions; how many are kept, none where llama.cpp cannot go back."""
        if self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), -1, length, -1):
            return length
        self.reset()
        return 0

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n]; the logits [vocab] after the last of them, the only ones computed."""
        tokens = (self.lib.llama_token * len(ids))(*ids.tolist())
        return self._decode(self.lib.llama_batch_get_one(tokens, len(ids)))

    def step(self, token_id: int) -> Logits:
        self._token[0] = token_id
        return self._decode(self._one)

    def logits(self, ids: Ids) -> Logits:
        """After each of ``ids`` [n], the first of an empty cache: [n, vocab], a view until the next call."""
        self.reset()
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids.tolist()):
                batch.token[index], batch.pos[index] = token, index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            self._run(batch)
        finally:
            self.lib.llama_batch_free(batch)
        found: Logits = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (len(ids), self.vocab_size))
        return found

    def _run(self, batch: llama_batch) -> None:
        failed = self.lib.llama_decode(self.context, batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}: {self._last_error()}")

    def _decode(self, batch: llama_batch) -> Logits:
        self._run(batch)
        pointer = self.lib.llama_get_logits(self.context)
        address = ctypes.addressof(pointer.contents)
        if address != self._address:
            self._logits = np.ctypeslib.as_array(pointer, (self.vocab_size,))
            self._address = address
        return self._logits

    def _context_options(self, threads: int, max_length: int) -> llama_context_params:
        options = self.lib.llama_context_default_params()
        options.n_ctx = max_length
        options.n_batch = max(options.n_batch, max_length)  # the prompt is one call; n_ubatch still splits it
        options.n_threads = options.n_threads_batch = threads
        return options

    def _checked(self, handle: T) -> T:
        if not handle:
            sys.exit(f"llama.cpp cannot load {self.path}: {self._last_error()}")
        return handle

    def _last_error(self) -> str:
        return self._errors[0] if self._errors else "it gave no reason"


def _listen(lib: ModuleType, errors: list[str]) -> object:
    """Add the errors that the library logs to ``errors``, in order, and drop what else it logs; the callback."""

    def note(level: int, text: bytes, _: object) -> None:
        if level == _ERROR and text.strip():
            errors.append(text.decode(errors="replace").strip())
            print(errors[-1], file=sys.stderr)

    callback = lib.llama_log_callback(note)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    return callback
