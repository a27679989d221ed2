"""The bundle: the directory that export hands to bench, generate and a board. No numpy, no torch.

A bundle holds::

    model.onnx        decode graph: logits of the last position only, [batch, 1, vocab]
    scoring.onnx      the same graph with the logits of every position, [batch, sequence, vocab], or of the last ones
    model.onnx.data   weights of both, memory-mapped by ONNX Runtime
    tokenizer.json, tokenizer_config.json, genai_config.json, ...
    bundle.json       this module's manifest

Inputs and outputs follow the ecosystem: ``input_ids`` [batch, sequence] int64, ``attention_mask`` [batch, total] int64,
``past_key_values.N.key/value`` [batch, kv_heads_N, past, head_dim] -> ``logits``, ``present.N.key/value``; of a short
convolution ``past_conv.N`` [batch, channels_N, kernel - 1] -> ``present_conv.N``, as onnxruntime-genai names them; of a
gated delta net the same of its convolution, and ``past_recurrent.N`` [batch, value_heads_N, key, value] ->
``present_recurrent.N``. N counts the layers that mix tokens, from 0. Past and present may share one buffer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

from saap.base.blocks import Count, DeltaHeads
from saap.base.blocks import LayerSizes as LayerSizes
from saap.base.caches import GROWING, Sliding
from saap.base.documents import Document
from saap.base.errors import UserError
from saap.base.hashing import known_sha256

FORMAT = 1
MANIFEST = "bundle.json"
MOST_FILES = 1000  # of a bundle, which has a dozen
DECODE_GRAPH = "model.onnx"
SCORING_GRAPH = "scoring.onnx"
# Input of the scoring graph that need not be given: the first position whose logits are wanted, from the end where it
# is negative. The head is a fifth of a small model's work, and of a context that answers follow one position is wanted.
FIRST_LOGIT = "first_logit"
# Input of a graph with sliding layers, on a CPU, that need not be given: the position that the first entry of their
# caches stands for. So those need not be longer than what the layers see.
WINDOW_START = "window_start"
# Positions of them that can always be taken back, as a conversation does whose template changes its last words.
WINDOW_BACK = 32
WEIGHTS = "model.onnx.data"
# Tokens of a prompt that a decoder reads at once. Activations and the operators' scratch grow with them, and pieces of
# this size cost no time.
PREFILL_CHUNK = 256


def window_capacity(window: int) -> int:
    """Positions of the cache of a layer that sees ``window``: what a token sees, and a piece of a prompt behind it."""
    return window - 1 + WINDOW_BACK + PREFILL_CHUNK


class BundleError(UserError):
    """A bundle that cannot be used; the message names the file and what to do."""


Size = Annotated[int, Meta(ge=1, lt=2**31)]
Bytes = Annotated[int, Meta(ge=0, le=2**62)]


@dataclass(frozen=True)
class CachePart:
    """An input of the graphs that carries what a layer remembers, and the output that takes its place."""

    past: str  # name of the input
    present: str  # name of the output
    shape: tuple[int | None, ...]  # behind the batch; None is one entry per position
    dtype: str
    window: int = 0  # positions that its layer sees, the newest included; 0 is all

    @property
    def grows(self) -> bool:
        """Whether it has an entry for each position; else it is one state, which no position can be taken out of."""
        return None in self.shape

    def sized(self, batch: int, positions: int) -> tuple[int, ...]:
        """Its shape for a number of sequences and positions."""
        return (batch, *(positions if size is None else size for size in self.shape))


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 of one file of the bundle."""

    bytes: Bytes
    sha256: str


@dataclass(frozen=True)
class Parity:
    """The scoring graph compared with the torch model of the same numbers."""

    max_abs_logit_difference: float  # largest, over all tokens and the vocabulary
    kl: float  # mean KL divergence of the graph from the model, nats per token
    top1_agreement: float  # share of tokens whose likeliest successor is the same
    nll_torch: float  # mean negative log-likelihood, nats per token; ``nll_graph`` likewise
    nll_graph: float
    perplexity_torch: float
    perplexity_graph: float
    perplexity_ratio: float  # the graph's over the model's
    tokens: int  # compared
    sample: str  # where they come from
    accuracy_level: int


class Ratios(TypedDict, total=False):
    """A plan's ratio of pruning, where it is known."""

    ratio: float | None


class LineagePlan(TypedDict, total=False):
    """Pruning as requested, as planned and as achieved."""

    asked: dict[str, float]
    planned: Ratios
    achieved: Ratios


class LineageText(TypedDict, total=False):
    """A text that the model has seen."""

    source: str | None
    sha256: str | None
    text_sha256: str | None


class Lineage(TypedDict, total=False):
    """The fields of ``BundleManifest.lineage`` that are read; it may hold more."""

    base: str | None
    base_sha256: str | None
    model_sha256: str
    head_bits: Count
    nodes: Count
    matrices: dict[str, Count]
    blocks: dict[str, Count]
    engines: dict[str, dict[str, object]] | None
    method: str | None
    plan: LineagePlan | None
    calibration: LineageText | None
    words: LineageText | None
    tuning: LineageText | None
    versions: dict[str, str] | None


@dataclass(frozen=True)
class Spelling:
    """Characters per token of a text, as the model's tokenizer splits it."""

    text: str  # which one
    characters_per_token: Annotated[float, Meta(gt=0, le=1e6)]


@dataclass(frozen=True)
class BundleManifest:
    """``bundle.json``. Sizes are in bytes; ``None`` is unknown.

    Attributes:
        lineage: where the model comes from: ``model_sha256`` of the exported weights, ``head_bits``, ``matrices`` (bits
            of linears that have other than ``bits``), ``blocks`` (group sizes of matrices that have other than
            ``block``), ``method``, ``plan`` and ``tuning`` of the slim directory.
    """

    target: str  # ``cpu``, ``cuda`` or ``portable``
    model_type: str
    vocab_size: Size
    hidden_size: Size
    head_dim: Size
    context_length: Size
    layers: Annotated[list[LayerSizes], Meta(min_length=1, max_length=10_000)]
    bits: int  # of the decoder's linears: 4, 8, 16 or 32
    block: Count  # group size along the input dimension; 0 for floats
    accuracy_level: int  # of MatMulNBits; 4 computes in int8
    parameters: Bytes
    weight_bytes_per_token: Annotated[int, Meta(ge=1, le=2**62)]  # read for every generated token
    kv_bytes_per_token: Bytes  # added to the cache per token
    kv_dtype: str  # ``float32``, ``float16`` or ``int8``
    bos_token_id: Count | None
    eos_token_ids: list[Count]  # every id that ends a text
    onnxruntime_min: str  # oldest version that runs it
    lineage: dict[str, Any] = field(default_factory=dict)
    parity: Parity | None = None  # None where it was not checked
    files: dict[str, FileEntry] = field(default_factory=dict)  # of all files but ``bundle.json``
    conv_kernel: Annotated[int, Meta(ge=0, le=1024)] = 0  # tokens that a convolution sees; 0 where there is none
    delta: DeltaHeads | None = None  # of the gated delta nets; None where there is none
    windows: list[Count] = field(default_factory=list)  # of each layer, as in CachePart; empty where none slides
    words: str = ""  # which tokens the head predicts, packed as in ``slim_vocabulary`` of a slim model; empty: all
    spelling: Spelling | None = None  # None where the tokenizer cannot say it
    format: int = FORMAT

    @property
    def kv_layers(self) -> list[LayerSizes]:
        """The layers that own a KV cache, in the order of the graph's ``past_key_values.N``."""
        return [layer for layer in self.layers if layer.query_heads and not layer.reads]

    @property
    def mixing_layers(self) -> list[LayerSizes]:
        """The layers that mix tokens, and so remember something: N of the graph's names counts them."""
        return [layer for layer in self.layers if _remembers(layer)]

    @property
    def cache(self) -> list[CachePart]:
        """Tensors that the graphs carry from one run to the next, in the order of the layers, keys before values."""
        parts = []
        mixing = [index for index, layer in enumerate(self.layers) if _remembers(layer)]
        for n, index in enumerate(mixing):
            layer = self.layers[index]
            if layer.query_heads:
                parts += [
                    CachePart(
                        f"past_key_values.{n}.{part}", f"present.{n}.{part}",
                        (layer.kv_heads, None, layer.head_dim or self.head_dim), self.kv_dtype,
                        self.windows[index] if self.windows else 0,
                    )
                    for part in ("key", "value")
                ]  # fmt: skip
                continue
            floats = "float32" if self.kv_dtype == "int8" else self.kv_dtype
            channels, state = layer.conv, self.delta
            if layer.delta and state:
                channels = layer.delta * (2 * state.key + state.values * state.value)
            parts.append(CachePart(f"past_conv.{n}", f"present_conv.{n}", (channels, self.conv_kernel - 1), floats))
            if layer.delta and state:
                heads = (layer.delta * state.values, state.key, state.value)
                parts.append(CachePart(f"past_recurrent.{n}", f"present_recurrent.{n}", heads, floats))
        return parts

    @property
    def sliding(self) -> Sliding:
        """The part of ``kv_bytes_per_token`` that stops growing."""
        parts = [part for part in self.cache if part.grows]
        sliding = [part for part in parts if part.window]
        if not sliding:
            return GROWING
        share = sum(prod(part.sized(1, 1)) for part in sliding) / sum(prod(part.sized(1, 1)) for part in parts)
        capacity = window_capacity(max(part.window for part in sliding))
        return Sliding(round(share * self.kv_bytes_per_token), capacity)

    @property
    def can_forget(self) -> bool:
        """Whether the last positions of a sequence can be taken back: not out of a state."""
        return all(part.grows for part in self.cache)

    @property
    def content_hash(self) -> str:
        """One sha256 over the files' hashes; results name a bundle by it."""
        text = json.dumps({name: entry.sha256 for name, entry in sorted(self.files.items())})
        return hashlib.sha256(text.encode()).hexdigest()


def _remembers(layer: LayerSizes) -> bool:
    return not layer.reads and bool(layer.query_heads or layer.conv or layer.delta)


def _check(manifest: BundleManifest) -> None:
    """Check that the sizes go together. Raises ValueError: they do not."""
    for name, value, allowed in (
        ("target", manifest.target, ("cpu", "cuda", "portable")),
        ("bits", manifest.bits, (4, 8, 16, 32)),
        ("kv_dtype", manifest.kv_dtype, ("float32", "float16", "int8")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}: {', '.join(map(str, allowed))} are allowed")
    if manifest.bits in (4, 8) and not manifest.block:
        raise ValueError(f"block is 0 at {manifest.bits} bits: integers have a group size")
    if manifest.windows and len(manifest.windows) != len(manifest.layers):
        raise ValueError(f"windows has {len(manifest.windows)} entries: there are {len(manifest.layers)} layers")
    for index, layer in enumerate(manifest.layers):
        heads, groups = layer.query_heads, layer.kv_heads
        if bool(heads) != bool(groups) or (groups and heads % groups):
            raise ValueError(f"layer {index} has {heads} query heads in {groups} KV groups: groups are of equal size")
        states = bool(layer.conv) + bool(layer.delta)
        if states and (heads or states > 1 or manifest.conv_kernel < 2):
            raise ValueError(f"layer {index} has a convolution beside attention, or one of fewer than 2 tokens")
        if layer.delta and manifest.delta is None:
            raise ValueError(f"layer {index} has a delta net, of heads that are not described")
    msgspec.convert(manifest.lineage, Lineage)
    for name, ids in (("eos_token_ids", manifest.eos_token_ids), ("bos_token_id", [manifest.bos_token_id or 0])):
        if beyond := [each for each in ids if each >= manifest.vocab_size]:
            raise ValueError(f"{name} holds {beyond[0]}: the vocabulary has {manifest.vocab_size} tokens")


DOCUMENT = Document(
    BundleManifest, "bundle", "export the bundle again", version="format", check=_check, error=BundleError
)


def write_manifest(directory: Path, manifest: BundleManifest) -> BundleManifest:
    """Hash every file of ``directory`` and write ``bundle.json`` beside them, last and by rename."""
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    files = {
        name: FileEntry((directory / name).stat().st_size, known_sha256(directory / name))
        for name in names
        if name != MANIFEST
    }
    complete = replace(manifest, files=files)
    DOCUMENT.write(directory / MANIFEST, complete)
    return complete


def _instead_of_bundle(path: Path) -> str:
    """Describe a path that holds no manifest, and say what to do."""
    if path.suffix == ".gguf" and path.is_file():
        return f"it is a GGUF file; `saap export` makes a bundle of it, and `saap bench llama.cpp:{path}` measures it"
    if path.is_file():
        return "it is a file; give the directory that `saap export` wrote"
    if not path.is_dir():
        return "there is no such directory; make one with `saap export MODEL -o BUNDLE`"
    if (path / "run.json").is_file():
        return "`saap run` wrote it; give one of the bundles in it"
    if (path / "config.json").is_file():
        return f"it is a model; make one of it with `saap export {path} -o BUNDLE`"
    return f"it has no {MANIFEST}; make one with `saap export MODEL -o BUNDLE`"


def read_manifest(directory: str | Path) -> BundleManifest:
    """Read ``bundle.json``.

    Raises BundleError: no bundle there, damaged, of a newer format, or naming a file outside the bundle.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError(f"{directory} is not a bundle: {_instead_of_bundle(directory)}")
    manifest = DOCUMENT.read(path)
    if len(manifest.files) > MOST_FILES:
        raise BundleError(f"{path} names {len(manifest.files)} files, {MOST_FILES} are allowed: do not use it")
    for name in manifest.files:
        if inside(directory, name) is None:
            raise BundleError(f"{path} names {name!r}, which lies outside the bundle: do not use it")
    return manifest


def is_there(path: Path) -> bool:
    """Whether there is such a file; False for a name that no file system allows, such as one that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def inside(folder: Path, name: str) -> Path | None:
    """Find a file below a folder by its relative name; None where it lies elsewhere, links followed."""
    path = folder / name
    try:
        strange = not name or "\\" in name or b"\0" in os.fsencode(name) or PurePosixPath(name).is_absolute()
        return None if strange or folder.resolve() not in path.resolve().parents else path
    except (ValueError, RuntimeError):  # half a surrogate pair; a link in a circle
        return None


def too_old(manifest: BundleManifest, installed: str) -> str | None:
    """Say why a version of ONNX Runtime is too old for the bundle's graphs; None if it is not."""
    needed = manifest.onnxruntime_min
    if _minor(installed) >= _minor(needed):
        return None
    return (
        f"needs ONNX Runtime {needed} or newer, and {installed} is installed, which would fail or compute it wrongly: "
        "pip install --upgrade onnxruntime (from 1.24 on for Python 3.11 and newer)"
    )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,4}", version)[:2])
