"""The runtime of ``genai:DIR``: onnxruntime-genai's own loop, greedy, token by token.

genai samples in its own code, so a step is ``generate_next_token`` and the logits never come to Python. It stops at an
end-of-text token by its own rules; a smallest length equal to the largest one keeps it going for an exact count.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

from export.bundle.genai import GENAI_CONFIG, Model, genai_document, genai_model, read_genai_model, shares_cache
from export.bundle.graph_check import check_graph
from export.bundle.manifest import MANIFEST, read_manifest
from export.engine.facts import PeerFacts, file_facts
from export.engine.onnxruntime import Decoder, Ids, Logits

PACKAGES = ("onnxruntime_genai",)
_NOT_HERE: Logits = np.empty(0, np.float32)


class GenaiDecoder:
    """A bundle, or a directory with somebody else's ``genai_config.json``; it continues with the token it has drawn."""

    def __init__(self, path: Path, threads: int, max_length: int) -> None:
        import onnxruntime_genai as genai

        self.path, self.max_length = path, max_length
        with tempfile.TemporaryDirectory(prefix="saap-genai-") as folder:
            _ours(path, Path(folder))
            config = genai.Config(folder)
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
            self._model = genai.Model(config)
        options = genai.GeneratorParams(self._model)
        total = max_length + 1  # the last token that is drawn takes no position of the cache
        options.set_search_options(
            do_sample=False, num_beams=1, repetition_penalty=1.0, min_length=total, max_length=total
        )
        self._made = partial(genai.Generator, self._model, options)
        self._generator = self._made()
        self._drawn = False

    def reset(self) -> None:
        """Forget the sequence; the buffers stay, but where a model has states, which genai cannot take back."""
        try:
            self._generator.rewind_to(0)
        except RuntimeError:
            self._generator = self._made()

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n] in one call; nothing is handed out, ``draw`` knows the token."""
        self._generator.append_tokens(np.ascontiguousarray(ids, np.int32).reshape(1, -1))
        self._drawn = False
        return _NOT_HERE

    def step(self, token_id: int) -> Logits:
        """Append the token that was drawn last, which ``token_id`` is by protocol, and draw the next."""
        self._generator.generate_next_token()
        self._drawn = True
        return _NOT_HERE

    def draw(self) -> int:
        """The next token. After a prompt it still has to be drawn, after a step it has been."""
        if not self._drawn:
            self._generator.generate_next_token()
            self._drawn = True
        return int(self._generator.get_next_tokens()[0])


load = GenaiDecoder


def model_of(path: Path) -> Model:
    """What genai must know of a directory's model: from the manifest of a bundle, else from ``genai_config.json``.

    Raises:
        BundleError: a manifest or a configuration that cannot be used.
    """
    return genai_model(read_manifest(path)) if (path / MANIFEST).is_file() else read_genai_model(path)


def _ours(path: Path, folder: Path) -> None:
    """Fill a folder with a configuration that we wrote, and links to the graph and its data: genai sees no other file.

    Raises:
        BundleError: as of :func:`model_of`, or data outside of the directory.
    """
    model, path = model_of(path), path.resolve()
    graph = path / model.decoder.filename
    for file in (graph, *check_graph(graph, nested=not (path / MANIFEST).is_file())):
        link = folder / file.relative_to(path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    shared = not (path / MANIFEST).is_file() or shares_cache(read_manifest(path))
    (folder / GENAI_CONFIG).write_text(json.dumps(genai_document(model, shared=shared)), encoding="utf-8")


def facts(decoder: Decoder) -> PeerFacts:
    """Versions, and sizes in bytes unless the directory is a bundle of ours, whose manifest has them."""
    assert isinstance(decoder, GenaiDecoder)
    versions = {"onnxruntime-genai": metadata.version("onnxruntime-genai")}
    if (decoder.path / MANIFEST).is_file():
        return PeerFacts(versions)
    graph = decoder.path / read_genai_model(decoder.path).decoder.filename
    return PeerFacts(versions, file_facts(graph, *check_graph(graph, nested=True)))
