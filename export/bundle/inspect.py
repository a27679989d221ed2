"""What is in a bundle: sizes per layer, bytes per token, nodes, precision, parity, provenance, files."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from devices.common.files import sha256_file
from export.bundle.graph_check import check_graph
from export.bundle.graph_facts import GraphFacts, read_graph
from export.bundle.manifest import DECODE_GRAPH, BundleManifest, read_manifest

UNVERIFIED = (
    "UNVERIFIED: nobody has compared this graph with its model; export again without --parity none before you trust it"
)
Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def inspect_bundle(path: str | Path) -> dict[str, Any]:
    """Everything that the manifest and the decode graph of a bundle say; JSON types only.

    Sizes are bytes; None is unknown. ``files`` are compared with their hashes, which reads them all.

    Raises:
        BundleError: no bundle, a damaged one, or weights that lie outside its folder.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    data_files = {}
    for name in sorted(n for n in {DECODE_GRAPH, *manifest.files} if n.endswith(".onnx")):
        data_files[name] = [f.relative_to(directory).as_posix() for f in check_graph(directory / name)]
    graph = read_graph(directory / DECODE_GRAPH)
    layers = [_layer(index, manifest, graph) for index in range(len(manifest.layers))]
    return {
        "bundle": str(directory),
        "hash": manifest.content_hash,
        "format": manifest.format,
        "target": manifest.target,
        "model_type": manifest.model_type,
        "sizes": {
            "parameters": manifest.parameters,
            "layers": len(layers),
            **{key: getattr(manifest, key) for key in ("hidden_size", "head_dim", "vocab_size", "context_length")},
        },
        "layers": layers,
        "bytes_per_token": _bytes_per_token(manifest, graph, layers),
        "precision": {
            **{key: getattr(manifest, key) for key in ("bits", "block", "accuracy_level", "kv_dtype")},
            **({"matrices": manifest.lineage["matrices"]} if "matrices" in manifest.lineage else {}),
        },
        "graph": {
            "opsets": graph.opsets,
            "ir_version": graph.ir_version,
            "producer": graph.producer,
            "nodes": dict(Counter(node.kind for node in graph.nodes).most_common()),
            "quantised": graph.quantised(),
            "initialisers": graph.by_dtype(),
        },
        "verified": manifest.parity is not None,
        "parity": None if manifest.parity is None else asdict(manifest.parity),
        "provenance": manifest.lineage,
        "onnxruntime_min": manifest.onnxruntime_min,
        "data_files": data_files,
        "files": [_file(directory, name, entry) for name, entry in sorted(manifest.files.items())],
    }


def _layer(index: int, manifest: BundleManifest, graph: GraphFacts) -> dict[str, Any]:
    tensors = [t for t in graph.tensors.values() if t.layer == index]
    return {
        "index": index,
        **asdict(manifest.layers[index]),
        "parameters": sum(t.parameters for t in tensors) or None,
        "bytes": sum(t.bytes for t in tensors) or None,
    }


def _bytes_per_token(manifest: BundleManifest, graph: GraphFacts, layers: list[dict[str, Any]]) -> dict[str, Any]:
    known = [layer["bytes"] for layer in layers]
    return {
        "weights": manifest.weight_bytes_per_token,
        "layers": None if None in known else sum(known),
        "head": graph.head_bytes(),
        "kv_cache": manifest.kv_bytes_per_token,
    }


def _file(directory: Path, name: str, entry: Any) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        state = "missing"
    else:
        same = path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256
        state = "ok" if same else "differs from its hash"
    return {"name": name, "bytes": entry.bytes, "state": state}


def inspection_lines(report: dict[str, Any]) -> list[str]:
    """The paragraph above the tables."""
    sizes, read = report["sizes"], report["bytes_per_token"]
    lines = [] if report["verified"] else [UNVERIFIED]
    lines += [
        f"{report['bundle']}: {report['model_type']} for {report['target']}, "
        f"{sizes['parameters'] / 1e6:.1f} M parameters in {sizes['layers']} layers, "
        f"hidden {sizes['hidden_size']}, head {sizes['head_dim']}, "
        f"vocabulary {sizes['vocab_size']}, context {sizes['context_length']}",
        f"  read per token: {_mb(read['weights'])} MB of weights (layers {_mb(read['layers'])}, head "
        f"{_mb(read['head'])}); written: {read['kv_cache']} bytes of {report['precision']['kv_dtype']} KV cache",
        f"  needs onnxruntime >= {report['onnxruntime_min']}; opsets "
        + ", ".join(f"{name} {version}" for name, version in report["graph"]["opsets"].items()),
        f"  bundle hash {report['hash'][:16]}",
    ]
    lines += _mixed_lines(report["precision"])
    lines += _parity_lines(report["parity"]) + _provenance_lines(report["provenance"])
    bad = [f"{file['name']} ({file['state']})" for file in report["files"] if file["state"] != "ok"]
    return lines + ([f"  DAMAGED: {', '.join(bad)}: export the bundle again"] if bad else [])


def _parity_lines(parity: dict[str, Any] | None) -> list[str]:
    if parity is None:
        return ["  parity: UNVERIFIED"]
    return [
        f"  parity on {parity['tokens']} tokens ({parity['sample']}): logit difference "
        f"{parity['max_abs_logit_difference']:.2g}, KL {parity['kl']:.2g}, top-1 agreement "
        f"{parity['top1_agreement']:.2%}, perplexity x {parity['perplexity_ratio']:.4f}"
    ]


def _mixed_lines(precision: dict[str, Any]) -> list[str]:
    """Which linears have other bits than the rest; nothing where all are alike."""
    lines = []
    if own := Counter(precision.get("matrices", {}).values()):
        linears = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(own.items()))
        lines.append(f"  mixed: of the model's linears {linears}, the others of {precision['bits']}")
    return lines


def _provenance_lines(lineage: dict[str, Any]) -> list[str]:
    """Where the model came from, as far as it is known."""
    lines = []
    if base := lineage.get("base_sha256"):
        lines.append(f"  base: {lineage.get('base', 'unnamed')}, sha256 {base[:16]}")
    lines.append(f"  exported from: sha256 {lineage.get('model_sha256', 'unknown')[:16]}")
    if method := lineage.get("method"):
        plan = lineage.get("plan") or {}
        asked = ", ".join(f"{key} {value:g}" for key, value in plan.get("asked", {}).items())
        ratios = [f"{key} {plan[key]['ratio']:.2%}" for key in ("planned", "achieved") if key in plan]
        lines.append("  " + ", ".join([f"pruned by: {method}", *([f"asked {asked}"] if asked else []), *ratios]))
    for key, what in (("calibration", "calibrated on"), ("tuning", "tuned on")):
        text = lineage.get(key) or {}
        if digest := text.get("sha256") or text.get("text_sha256"):
            lines.append(f"  {what}: {text.get('source', 'a text')}, sha256 {digest[:16]}")
    if versions := lineage.get("versions"):
        lines.append("  made with: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return lines


def inspection_tables(report: dict[str, Any]) -> list[Table]:
    """Title, columns and rows of each table, for ``saap.cli.console.print_table``."""
    graph = report["graph"]
    nodes = [[kind, str(count)] for kind, count in graph["nodes"].items()]
    matrices = [
        [q["node"], str(q["bits"]), str(q["block"]), _cell(q["accuracy_level"]), str(q["count"]), _mb(q["bytes"])]
        for q in graph["quantised"]
    ]
    stored = [[name, str(kind["count"]), _mb(kind["bytes"])] for name, kind in graph["initialisers"].items()]
    files = [[file["name"], str(file["bytes"]), file["state"]] for file in report["files"]]
    tables = [
        ("layers", ["layers", "query heads", "KV heads", "FFN", "M params", "MB"], _layer_rows(report["layers"])),
        ("nodes of the decode graph", ["operator", "count"], nodes),
        ("quantised matrices", ["node", "bits", "block", "accuracy level", "count", "MB"], matrices),
        ("tensors of the decode graph", ["type", "count", "MB"], stored),
        ("files", ["file", "bytes", "state"], files),
    ]
    return [table for table in tables if table[2]]


def _layer_rows(layers: list[dict[str, Any]]) -> list[list[str]]:
    """One row for each run of layers that are alike."""

    def cells(layer: dict[str, Any]) -> list[str]:
        parameters = layer["parameters"]
        millions = "-" if parameters is None else f"{parameters / 1e6:.3f}"
        counts = [str(layer[key]) for key in ("query_heads", "kv_heads", "ffn")]
        return [*counts, millions, "-" if layer["bytes"] is None else f"{layer['bytes'] / 1e6:.3f}"]

    rows = []
    for same, run in groupby(layers, key=cells):
        indices = [layer["index"] for layer in run]
        rows.append([f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0]), *same])
    return rows


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)
