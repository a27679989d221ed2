"""The models that an evaluation takes: directories, bundles in one of their engines, GGUF files in llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from export import bundle as bundles
from export.bundle.manifest import MANIFEST, BundleManifest, read_manifest
from export.engine.opening import logits_in_process, open_engine
from export.engine.protocol import EngineOptions, Ids, Logits, greedy
from export.engine.scoring import BundleScorer
from export.engine.spec import resolve as resolve_engine
from export.engine.table import LLAMA_CPP, ONNXRUNTIME, TORCH, Row, row_of
from export.engine.torch import TorchEngine
from saap.base.errors import UserError
from saap.base.files import parse_json
from saap.base.gguf_header import GgufHeader, read_header
from saap.base.needs import fits
from saap.base.progress import Progress
from saap.evaluate.answers import Writer
from saap.evaluate.continuations import Scorer, cached_continuations, torch_continuations
from saap.evaluate.perplexity import Score, torch_scorer
from saap.models.architectures import positions_of, shape_of
from saap.models.checkpoint import read_config
from saap.models.record import read_record
from saap.models.resolve import resolve, tokenizer_of_gguf
from saap.models.streaming import open_model, whole_needs
from saap.models.weight_files import weights_bytes

IN_LLAMA_CPP = f"{LLAMA_CPP}:"  # before a GGUF file


class Subject(Protocol):
    """A model that is evaluated."""

    @property
    def name(self) -> str:
        """Its name in the result."""

    @property
    def path(self) -> Path:
        """A directory with the tokenizer."""

    @property
    def engine(self) -> str:
        """The engine that runs it."""

    def size(self) -> tuple[int, int]:
        """Count parameters, and bytes of the weights files."""

    def positions(self) -> int:
        """Count the tokens that it reads at most."""

    def lineage(self) -> Mapping[str, object]:
        """Name the texts that it was calibrated and tuned on."""

    def scorer(self, device: torch.device) -> Score:
        """Load what gives logits, on this device where it can be."""

    def continuations(self, device: torch.device) -> tuple[Scorer, int]:
        """Load what weighs continuations; and count the tokens of its context."""

    def writer(self, device: torch.device, stops: Sequence[int], positions: int) -> Writer:
        """Load what answers prompts, up to one of ``stops``, in at most ``positions`` of context."""


Model = str | Path | Subject


@dataclass(frozen=True)
class Directory:
    """A model directory in torch."""

    name: str
    path: Path
    engine: str = TORCH

    def size(self) -> tuple[int, int]:
        return shape_of(read_config(self.path)).parameters, weights_bytes(self.path)

    def positions(self) -> int:
        return positions_of(read_config(self.path))

    def lineage(self) -> Mapping[str, object]:
        record = read_record(self.path)
        return {**record.get("lineage", {}), "tuning": record.get("tuning", {}).get("text")}

    def scorer(self, device: torch.device) -> Score:
        return torch_scorer(open_model(self.path, device))

    def continuations(self, device: torch.device) -> tuple[Scorer, int]:
        model = open_model(self.path, device)
        return torch_continuations(model), int(model.config.max_position_embeddings)

    def writer(self, device: torch.device, stops: Sequence[int], positions: int) -> Writer:
        """Load the model as a whole. Raises UserError: it does not fit into memory."""
        if not fits(whole_needs(self.path)):
            raise UserError(
                f"{self.name} does not fit into memory as a whole, so it answers nothing: leave --answers out"
            )
        engine = TorchEngine(open_model(self.path, device), self.path, EngineOptions(max_length=positions))
        return lambda prompt, tokens: greedy(engine, prompt, tokens, stops)


@dataclass(frozen=True)
class Bundle:
    """A bundle in one of its engines; ONNX Runtime runs in this process, others in one of their own."""

    name: str
    path: Path
    row: Row = field(default_factory=lambda: row_of(ONNXRUNTIME))

    @property
    def engine(self) -> str:
        return self.row.name

    @property
    def manifest(self) -> BundleManifest:
        return read_manifest(self.path)

    def size(self) -> tuple[int, int]:
        """Count parameters, and bytes of what the engine reads."""
        manifest = self.manifest
        if self.row.file:
            self.row.source(bundles.Bundle.open(self.path))  # refuses a bundle without the file
            return manifest.parameters, manifest.files[self.row.file].bytes
        return manifest.parameters, sum(entry.bytes for name, entry in manifest.files.items() if ".onnx" in name)

    def positions(self) -> int:
        return self.manifest.context_length

    def lineage(self) -> Mapping[str, object]:
        return self.manifest.lineage

    def scorer(self, device: torch.device) -> Score:
        threads = torch.get_num_threads()
        logits: Callable[[Ids], Logits]
        if self.engine == ONNXRUNTIME:
            logits = self._scorer(threads).logits
        else:
            logits = logits_in_process(self.row, self.row.source(self._checked()), threads)
        return lambda ids: torch.from_numpy(logits(ids.cpu().numpy()))

    def continuations(self, device: torch.device) -> tuple[Scorer, int]:
        """Load with a thread per question instead of several for each."""
        return cached_continuations(self._scorer(1).read, torch.get_num_threads()), self.positions()

    def writer(self, device: torch.device, stops: Sequence[int], positions: int) -> Writer:
        engine = open_engine(self.path, EngineOptions(torch.get_num_threads(), positions))
        return lambda prompt, tokens: greedy(engine, prompt, tokens, stops)

    def _scorer(self, threads: int) -> BundleScorer:
        return BundleScorer(self._checked().path, threads)

    def _checked(self) -> bundles.Bundle:
        """Open the bundle, every file of it checked: the tokenizer is read by transformers."""
        return bundles.Bundle.open(self.path).check()


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file in llama.cpp."""

    name: str
    file: Path
    tokenizer: Path | None = None  # a directory with its tokenizer; None: the file's own
    engine: str = LLAMA_CPP

    @cached_property
    def path(self) -> Path:
        return self.tokenizer or tokenizer_of_gguf(self.file)

    @cached_property
    def header(self) -> GgufHeader:
        return read_header(self.file)

    def size(self) -> tuple[int, int]:
        """Count parameters, and bytes of the file."""
        return sum(math.prod(tensor.shape) for tensor in self.header.tensors.values()), self.file.stat().st_size

    def positions(self) -> int:
        return self.header.context_length or 0

    def lineage(self) -> Mapping[str, object]:
        """Read what saap wrote into the file; nothing is known of others."""
        lineage = parse_json(str(self.header.metadata.get("saap.lineage", "{}")))
        return lineage if isinstance(lineage, dict) else {}

    def scorer(self, device: torch.device) -> Score:
        logits = logits_in_process(row_of(LLAMA_CPP), self.file, torch.get_num_threads())
        return lambda ids: torch.from_numpy(logits(ids.cpu().numpy()))

    def continuations(self, device: torch.device) -> tuple[Scorer, int]:
        raise NotImplementedError("zero-shot tasks are not asked of llama.cpp")

    def writer(self, device: torch.device, stops: Sequence[int], positions: int) -> Writer:
        raise NotImplementedError("llama.cpp is given no prompts")


def subject_of(model: Model, name: str = "", progress: Progress | None = None) -> Subject:
    """Recognise ``llama.cpp:FILE``, ``BUNDLE``, ``BUNDLE@ENGINE``, a directory or a name.

    Args:
        name: in the result; by default what was given.

    Raises UserError: nothing there, or an engine that is not known.
    """
    if not isinstance(model, str | Path):
        return model
    name = name or str(model)
    if str(model).startswith(IN_LLAMA_CPP):
        return GgufFile(name, Path(str(model).removeprefix(IN_LLAMA_CPP)))
    spec = resolve_engine(model, progress)
    if spec.engine is not None or (spec.bundle / MANIFEST).is_file():
        return Bundle(name, spec.bundle, spec.row)
    return Directory(name, resolve(model, progress=progress))
