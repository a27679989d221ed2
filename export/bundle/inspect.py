"""What is in a bundle: sizes per layer, bytes per token, nodes, precision, parity, provenance, files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from export.bundle.graph_check import check_graph
from export.bundle.graph_facts import GraphFacts, read_graph
from export.bundle.manifest import DECODE_GRAPH, BundleManifest, FileEntry, read_manifest
from saap.base.files import sha256_file

UNVERIFIED = (
    "UNVERIFIED: nobody has compared this graph with its model; export again without --parity none before you trust it"
)
Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


@dataclass(frozen=True)
class Layer:
    """A decoder layer; ``parameters`` and ``bytes`` are None where the graph does not tell."""

    index: int
    query_heads: int
    kv_heads: int
    ffn: int
    conv: int
    delta: int
    parameters: int | None
    bytes: int | None


@dataclass(frozen=True)
class FileState:
    """A file against its hash: ``ok``, ``missing`` or ``differs from its hash``."""

    name: str
    bytes: int
    state: str


@dataclass(frozen=True)
class Inspection:
    """Everything that the manifest, the decode graph and the files of a bundle say."""

    bundle: Path
    manifest: BundleManifest
    graph: GraphFacts
    layers: list[Layer]
    files: list[FileState]
    data_files: dict[str, list[str]]

    @property
    def layer_bytes(self) -> int | None:
        """Bytes of all layers; None where those of one are not known."""
        known = [layer.bytes for layer in self.layers if layer.bytes is not None]
        return sum(known) if len(known) == len(self.layers) else None

    def document(self) -> dict[str, object]:
        """All of it in JSON types; sizes are bytes, None is unknown."""
        manifest, graph = self.manifest, self.graph
        own_forms = {key: value for key, value in manifest.lineage.items() if key in ("matrices", "blocks")}
        return {
            "bundle": str(self.bundle),
            "hash": manifest.content_hash,
            **_fields(manifest, "format", "target", "model_type"),
            "sizes": {
                "parameters": manifest.parameters,
                "layers": len(self.layers),
                **_fields(manifest, "hidden_size", "head_dim", "vocab_size", "context_length"),
            },
            "layers": [asdict(layer) for layer in self.layers],
            "bytes_per_token": {
                "weights": manifest.weight_bytes_per_token,
                "layers": self.layer_bytes,
                "head": graph.head_bytes(),
                "kv_cache": manifest.kv_bytes_per_token,
            },
            "precision": _fields(manifest, "bits", "block", "accuracy_level", "kv_dtype") | own_forms,
            "graph": {
                **_fields(graph, "opsets", "ir_version", "producer"),
                "nodes": dict(Counter(node.kind for node in graph.nodes).most_common()),
                "quantised": [asdict(each) for each in graph.quantised()],
                "initialisers": {name: asdict(stored) for name, stored in graph.by_dtype().items()},
            },
            "verified": manifest.parity is not None,
            "parity": None if manifest.parity is None else asdict(manifest.parity),
            "provenance": manifest.lineage,
            "onnxruntime_min": manifest.onnxruntime_min,
            "data_files": self.data_files,
            "files": [asdict(file) for file in self.files],
        }

    def lines(self) -> list[str]:
        """The paragraph above the tables."""
        manifest = self.manifest
        lines = [UNVERIFIED] if manifest.parity is None else []
        lines += [
            f"{self.bundle}: {manifest.model_type} for {manifest.target}, "
            f"{manifest.parameters / 1e6:.1f} M parameters in {len(self.layers)} layers, "
            f"hidden {manifest.hidden_size}, head {manifest.head_dim}, "
            f"vocabulary {manifest.vocab_size}, context {manifest.context_length}",
            f"  read per token: {_mb(manifest.weight_bytes_per_token)} MB of weights (layers {_mb(self.layer_bytes)}, "
            f"head {_mb(self.graph.head_bytes())}); written: {manifest.kv_bytes_per_token} bytes of "
            f"{manifest.kv_dtype} KV cache",
            f"  needs onnxruntime >= {manifest.onnxruntime_min}; opsets "
            + ", ".join(f"{name} {version}" for name, version in self.graph.opsets.items()),
            f"  bundle hash {manifest.content_hash[:16]}",
        ]
        if own := Counter(manifest.lineage.get("matrices", {}).values()):
            linears = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(own.items()))
            lines.append(f"  mixed: of the model's linears {linears}, the others of {manifest.bits}")
        if own := Counter(manifest.lineage.get("blocks", {}).values()):
            matrices = ", ".join(f"{count} in groups of {size}" for size, count in sorted(own.items()))
            lines.append(f"  mixed: of the model's matrices {matrices}, the others of {manifest.block}")
        if parity := manifest.parity:
            lines.append(
                f"  parity on {parity.tokens} tokens ({parity.sample}): logit difference "
                f"{parity.max_abs_logit_difference:.2g}, KL {parity.kl:.2g}, top-1 agreement "
                f"{parity.top1_agreement:.2%}, perplexity x {parity.perplexity_ratio:.4f}"
            )
        else:
            lines.append("  parity: UNVERIFIED")
        lines += _provenance_lines(manifest)
        bad = [f"{file.name} ({file.state})" for file in self.files if file.state != "ok"]
        return lines + ([f"  DAMAGED: {', '.join(bad)}: export the bundle again"] if bad else [])

    def tables(self) -> list[Table]:
        """What ``saap.cli.console.print_table`` shows; empty tables are left out."""
        nodes = Counter(node.kind for node in self.graph.nodes).most_common()
        matrices = []
        for q in self.graph.quantised():
            level = "-" if q.accuracy_level is None else str(q.accuracy_level)
            matrices.append([q.node, str(q.bits), str(q.block), level, str(q.count), _mb(q.bytes)])
        stored = [[name, str(kind.count), _mb(kind.bytes)] for name, kind in self.graph.by_dtype().items()]
        tables = [
            ("layers", _layer_columns(self.layers), _layer_rows(self.layers)),
            ("nodes of the decode graph", ["operator", "count"], [[kind, str(count)] for kind, count in nodes]),
            ("quantised matrices", ["node", "bits", "block", "accuracy level", "count", "MB"], matrices),
            ("tensors of the decode graph", ["type", "count", "MB"], stored),
            ("files", ["file", "bytes", "state"], [[f.name, str(f.bytes), f.state] for f in self.files]),
        ]
        return [table for table in tables if table[2]]


def inspect_bundle(path: str | Path) -> Inspection:
    """Read a bundle; ``files`` are compared with their hashes, which reads them all.

    Raises BundleError: no bundle, a damaged one, or weights that lie outside its folder.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    data_files = {}
    for name in sorted(n for n in {DECODE_GRAPH, *manifest.files} if n.endswith(".onnx")):
        data_files[name] = [f.relative_to(directory).as_posix() for f in check_graph(directory / name)]
    graph = read_graph(directory / DECODE_GRAPH)
    layers = []
    for index, sizes in enumerate(manifest.layers):
        tensors = [t for t in graph.tensors.values() if t.layer == index]
        counts = (sum(t.parameters for t in tensors) or None, sum(t.bytes for t in tensors) or None)
        layers.append(Layer(index, sizes.query_heads, sizes.kv_heads, sizes.ffn, sizes.conv, sizes.delta, *counts))
    files = [FileState(name, e.bytes, _state(directory / name, e)) for name, e in sorted(manifest.files.items())]
    return Inspection(directory, manifest, graph, layers, files, data_files)


def _fields(of: object, *names: str) -> dict[str, object]:
    return {name: getattr(of, name) for name in names}


def _state(path: Path, entry: FileEntry) -> str:
    if not path.is_file():
        return "missing"
    same = path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256
    return "ok" if same else "differs from its hash"


def _provenance_lines(manifest: BundleManifest) -> list[str]:
    """Where the model came from, as far as it is known."""
    lines, lineage = [], manifest.lineage
    if base := lineage.get("base_sha256"):
        lines.append(f"  base: {lineage.get('base', 'unnamed')}, sha256 {base[:16]}")
    lines.append(f"  exported from: sha256 {lineage.get('model_sha256', 'unknown')[:16]}")
    if method := lineage.get("method"):
        plan = lineage.get("plan") or {}
        asked = ", ".join(f"{key} {value:g}" for key, value in plan.get("asked", {}).items())
        reached = {key: plan.get(key, {}).get("ratio") for key in ("planned", "achieved")}
        ratios = [f"{key} {ratio:.2%}" for key, ratio in reached.items() if ratio is not None]
        lines.append("  " + ", ".join([f"pruned by: {method}", *([f"asked {asked}"] if asked else []), *ratios]))
    for key, what in (("calibration", "calibrated on"), ("tuning", "tuned on")):
        text: Mapping[str, str] = lineage.get(key) or {}
        if digest := text.get("sha256") or text.get("text_sha256"):
            lines.append(f"  {what}: {text.get('source', 'a text')}, sha256 {digest[:16]}")
    if versions := lineage.get("versions"):
        lines.append("  made with: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return lines


def _layer_columns(layers: list[Layer]) -> list[str]:
    return ["layers", "query heads", "KV heads", *(title for _, title in _rare(layers)), "FFN", "M params", "MB"]


def _rare(layers: list[Layer]) -> list[tuple[str, str]]:
    """Field and title of the sizes that only some families have."""
    titles = {"conv": "convolution", "delta": "delta heads"}
    return [(name, title) for name, title in titles.items() if any(getattr(layer, name) for layer in layers)]


def _layer_rows(layers: list[Layer]) -> list[list[str]]:
    """One row for each run of layers that are alike."""
    rare = [name for name, _ in _rare(layers)]

    def cells(layer: Layer) -> list[str]:
        sizes = (layer.query_heads, layer.kv_heads, *(getattr(layer, name) for name in rare), layer.ffn)
        counts = [str(count) for count in sizes]
        return counts + ["-" if n is None else f"{n / 1e6:.3f}" for n in (layer.parameters, layer.bytes)]

    rows = []
    for same, run in groupby(layers, key=cells):
        indices = [layer.index for layer in run]
        rows.append([f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0]), *same])
    return rows


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"
