"""The engine of ``genai:DIR``: onnxruntime-genai's own loop, greedy, token by token.

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

from export.bundle import Bundle, foreign_graph
from export.bundle.genai import GENAI_CONFIG, Model, genai_document, genai_model, read_genai_model, shares_cache
from export.bundle.manifest import MANIFEST, read_manifest
from export.engine.facts import ModelFacts, file_facts
from export.engine.protocol import Engine, EngineOptions, Ids, Logits

_NOT_HERE: Logits = np.empty(0, np.float32)


class GenaiEngine(Engine):
    """A bundle, or a directory with somebody else's ``genai_config.json``; it continues with the token it has drawn."""

    hands_out_logits = False

    def __init__(self, source: Path, options: EngineOptions) -> None:
        import onnxruntime_genai as genai

        self.path, self.max_length = source, options.max_length
        session = {"intra_op_num_threads": options.threads}
        with tempfile.TemporaryDirectory(prefix="saap-genai-") as folder:
            _ours(source, Path(folder))
            config = genai.Config(folder)
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            self._model = genai.Model(config)
        search = genai.GeneratorParams(self._model)
        total = options.max_length + 1  # the last token that is drawn takes no position of the cache
        search.set_search_options(
            do_sample=False, num_beams=1, repetition_penalty=1.0, min_length=total, max_length=total
        )
        self._new_generator = partial(genai.Generator, self._model, search)
        self._generator = self._new_generator()
        self._drawn = False

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions; none is kept of a model with states."""
        try:
            self._generator.rewind_to(length)
        except RuntimeError:  # genai cannot take states back
            self._generator, length = self._new_generator(), 0
        self._drawn = False
        return length

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n] in one call; nothing is handed out, ``next_token`` knows the token."""
        self._generator.append_tokens(np.ascontiguousarray(ids, np.int32).reshape(1, -1))
        self._drawn = False
        return _NOT_HERE

    def step(self, token_id: int) -> Logits:
        """Append the token that was drawn last, which ``token_id`` is by protocol, and draw the next."""
        self._generator.generate_next_token()
        self._drawn = True
        return _NOT_HERE

    def next_token(self, logits: Logits) -> int:
        """Choose the next token. After a prompt it still has to be drawn, after a step it has been."""
        if not self._drawn:
            self._generator.generate_next_token()
            self._drawn = True
        return int(self._generator.get_next_tokens()[0])

    def versions(self) -> dict[str, str]:
        return {"onnxruntime-genai": metadata.version("onnxruntime-genai")}

    def facts(self) -> ModelFacts | None:
        if (self.path / MANIFEST).is_file():
            return None
        return file_facts(*foreign_graph(self.path / read_genai_model(self.path).decoder.filename))


def model_of(path: Path) -> Model:
    """Describe a directory's model to genai: from the manifest of a bundle, else from ``genai_config.json``.

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
    bundle = Bundle.open(path) if (path / MANIFEST).is_file() else None
    graph = model.decoder.filename
    for file in foreign_graph(path / graph) if bundle is None else bundle.graph_files(graph):
        link = folder / file.relative_to(path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    shared = bundle is None or shares_cache(bundle.manifest)
    (folder / GENAI_CONFIG).write_text(json.dumps(genai_document(model, shared=shared)), encoding="utf-8")


open = GenaiEngine
