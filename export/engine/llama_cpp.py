"""A GGUF file in llama.cpp: the library's own decode call through ctypes, token by token.

llama-cpp-python's ``Llama`` class copies logits and samples in Python; here a step is one ``llama_decode``, and the
logits are a view of the library's buffer. Context options are the library's defaults, except for lengths, threads and
flash attention, where that is said.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from export.engine.facts import SIZES, ModelFacts
from export.engine.huge_pages import with_huge_pages
from export.engine.protocol import Engine, EngineOptions, Ids, Logits
from export.engine.table import FLASH_ATTENTION
from saap.base.gguf_header import read_header

if TYPE_CHECKING:
    from llama_cpp.llama_cpp import llama_batch, llama_context_params

T = TypeVar("T")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_KV_BYTES = {0: 4, 1: 2}  # ggml types of the cache: F32, F16


class LlamaCppEngine(Engine):
    """A GGUF file whose header was checked; llama.cpp rounds the positions of its cache up to its own granularity."""

    def __init__(self, source: Path, options: EngineOptions) -> None:
        from llama_cpp import llama_cpp

        self.lib: ModuleType = llama_cpp
        self.path, self.max_length = source, options.max_length
        self._errors: list[str] = []
        self._callback = _listen(llama_cpp, self._errors)  # the library calls it as long as we decode
        llama_cpp.llama_backend_init()
        on_cpu = llama_cpp.llama_model_default_params()
        on_cpu.n_gpu_layers = 0
        self.model, self.huge_page_bytes = with_huge_pages(
            lambda: self._checked(llama_cpp.llama_model_load_from_file(str(source).encode(), on_cpu)),
            source.stat().st_size if options.huge_pages else 0,
        )
        self.options = self._context_options(options.threads, options.max_length)
        if options.choice is not None:
            self.options.flash_attn_type = FLASH_ATTENTION[options.choice]
        self.context = self._checked(llama_cpp.llama_init_from_model(self.model, self.options))
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)))
        self._token = (llama_cpp.llama_token * 1)()
        self._one = llama_cpp.llama_batch_get_one(self._token, 1)
        self._address, self._logits = 0, np.empty(0, np.float32)

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions; how many are kept, none where llama.cpp cannot go back."""
        memory = self.lib.llama_get_memory(self.context)
        if length and self.lib.llama_memory_seq_rm(memory, -1, length, -1):
            return length
        self.lib.llama_memory_clear(memory, False)
        return 0

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n]; the logits [vocab] after the last of them, the only ones computed."""
        tokens = (self.lib.llama_token * len(ids))(*ids.tolist())
        return self._decode(self.lib.llama_batch_get_one(tokens, len(ids)))

    def step(self, token_id: int) -> Logits:
        self._token[0] = token_id
        return self._decode(self._one)

    def logits(self, rows: Ids) -> Logits:
        return np.stack([self._row(ids) for ids in rows])

    def _row(self, ids: Ids) -> Logits:
        """Logits [n, vocab] after each of ``ids`` [n], the first of an empty cache."""
        self.rewind(0)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids.tolist()):
                batch.token[index], batch.pos[index] = token, index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            self._run(batch)
        finally:
            self.lib.llama_batch_free(batch)
        logits: Logits = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (len(ids), self.vocab_size))
        return np.array(logits)

    def versions(self) -> dict[str, str]:
        """Its version, llama.cpp's system line and the options that matter."""
        import llama_cpp

        lib, options = self.lib, self.options
        context = (
            f"n_ctx {lib.llama_n_ctx(self.context)}, n_batch {options.n_batch}, n_ubatch {options.n_ubatch}, "
            f"type_k {options.type_k}, type_v {options.type_v}"
        )
        return {
            "llama-cpp-python": llama_cpp.__version__,
            "llama.cpp system": lib.llama_print_system_info().decode().strip(),
            "llama.cpp options": context,
        }

    def facts(self) -> ModelFacts:
        header, options = read_header(self.path), self.options
        per_value = _KV_BYTES.get(options.type_k) if options.type_k == options.type_v else None
        model = ModelFacts(
            parameters=int(self.lib.llama_model_n_params(self.model)),
            model_bytes=self.path.stat().st_size,
            weight_bytes_per_token=header.weight_bytes_per_token,
            kv_bytes_per_token=header.kv_bytes_per_token(per_value) if per_value else None,
            bits=header.bits,
        )
        return replace(
            model, unknown={name: "the header does not tell" for name in SIZES if getattr(model, name) is None}
        )

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
        super().close()

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


open = LlamaCppEngine
