"""The runtime of ``llama.cpp:FILE.gguf``: what it tells of a model and of itself."""

from __future__ import annotations

from dataclasses import replace

from export.engine.facts import SIZES, ModelFacts, PeerFacts
from export.engine.llama_cpp import LlamaCppDecoder
from export.engine.onnxruntime import Decoder
from saap.base.gguf_header import read_header

PACKAGES = ("llama_cpp.llama_cpp",)
_KV_BYTES = {0: 4, 1: 2}  # ggml types of the cache: F32, F16
load = LlamaCppDecoder


def facts(decoder: Decoder) -> PeerFacts:
    """Sizes in bytes, versions, llama.cpp's system line and the options that matter."""
    import llama_cpp

    assert isinstance(decoder, LlamaCppDecoder)
    lib, header, options = decoder.lib, read_header(decoder.path), decoder.options
    per_value = _KV_BYTES.get(options.type_k) if options.type_k == options.type_v else None
    model = ModelFacts(
        parameters=int(lib.llama_model_n_params(decoder.model)),
        model_bytes=decoder.path.stat().st_size,
        weight_bytes_per_token=header.weight_bytes_per_token,
        kv_bytes_per_token=header.kv_bytes_per_token(per_value) if per_value else None,
        bits=header.bits,
    )
    unknown = {name: "the header does not tell" for name in SIZES if getattr(model, name) is None}
    told = (
        f"n_ctx {lib.llama_n_ctx(decoder.context)}, n_batch {options.n_batch}, n_ubatch {options.n_ubatch}, "
        f"type_k {options.type_k}, type_v {options.type_v}"
    )
    versions = {
        "llama-cpp-python": llama_cpp.__version__,
        "llama.cpp system": lib.llama_print_system_info().decode().strip(),
        "llama.cpp options": told,
    }
    return PeerFacts(versions, replace(model, unknown=unknown))
