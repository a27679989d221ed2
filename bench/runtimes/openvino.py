"""The runtime of ``BUNDLE@openvino`` and ``openvino:DIR``: what it tells of a model and of itself."""

from __future__ import annotations

from export.engine.facts import PeerFacts, file_facts
from export.engine.onnxruntime import Decoder
from export.engine.openvino import IR, OpenVinoDecoder

PACKAGES = ("openvino",)
load = OpenVinoDecoder


def facts(decoder: Decoder) -> PeerFacts:
    """Version and precisions; sizes unless the directory is a bundle, whose manifest has them."""
    import openvino

    assert isinstance(decoder, OpenVinoDecoder)
    path, asked = decoder.path, ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    told = ", ".join(f"{name} {_named(decoder.compiled.get_property(name))}" for name in asked)
    model = file_facts(path / IR, (path / IR).with_suffix(".bin")) if (path / IR).is_file() else None
    return PeerFacts({"openvino": openvino.__version__, "openvino options": told}, model)


def _named(value: object) -> str:
    """A type by its name, as OpenVINO's own tools print it."""
    return str(getattr(value, "to_string", lambda: value)())
