"""The runtime of ``BUNDLE@openvino`` and ``openvino:DIR``: what it tells of a model and of itself."""

from __future__ import annotations

from dataclasses import replace

from bench.runtimes.facts import SIZES, ModelFacts, PeerFacts, graph_facts
from export.bundle.decoder import Decoder
from export.bundle.manifest import DECODE_GRAPH
from export.bundle.openvino import IR, OpenVinoDecoder

PACKAGES = ("openvino",)
load = OpenVinoDecoder


def facts(decoder: Decoder) -> PeerFacts:
    """Sizes in bytes, the version, and what it computes and keeps the cache in."""
    import openvino

    assert isinstance(decoder, OpenVinoDecoder)
    path, asked = decoder.path, ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    told = ", ".join(f"{name} {_named(decoder.compiled.get_property(name))}" for name in asked)
    if (path / IR).is_file():
        weights = (path / IR).with_suffix(".bin").stat().st_size
        model = ModelFacts(model_bytes=weights + (path / IR).stat().st_size)
        model = replace(model, unknown={name: "an IR is not unpacked" for name in SIZES if name != "model_bytes"})
    else:
        model = graph_facts(path / DECODE_GRAPH)
    return PeerFacts({"openvino": openvino.__version__, "openvino options": told}, model)


def _named(value: object) -> str:
    """A type by its name, as OpenVINO's own tools print it."""
    return str(getattr(value, "to_string", lambda: value)())
