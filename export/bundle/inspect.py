"""Contents of a bundle as its manifest lists them: sizes, bytes per token, precision, parity, provenance, files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from export.bundle.bundle import Bundle
from export.bundle.manifest import BundleError, BundleManifest, LayerSizes, is_there

UNVERIFIED = (
    "UNVERIFIED: nobody has compared this graph with its model; export again without --parity none before you trust it"
)
Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


@dataclass(frozen=True)
class FileState:
    """A file against its hash: ``ok``, ``missing`` or ``differs from its hash``."""

    name: str
    bytes: int
    state: str


@dataclass(frozen=True)
class Inspection:
    """A bundle's manifest, and its files compared with it."""

    bundle: Path
    manifest: BundleManifest
    files: list[FileState]

    def document(self) -> dict[str, object]:
        """All of it in JSON types; sizes are bytes, None is unknown."""
        manifest = self.manifest
        own_forms = {key: value for key, value in manifest.lineage.items() if key in ("matrices", "blocks")}
        return {
            "bundle": str(self.bundle),
            "hash": manifest.content_hash,
            **_fields(manifest, "format", "target", "model_type"),
            "sizes": {
                "parameters": manifest.parameters,
                "layers": len(manifest.layers),
                **_fields(manifest, "hidden_size", "head_dim", "vocab_size", "context_length"),
            },
            "layers": [asdict(layer) for layer in manifest.layers],
            "bytes_per_token": {
                "weights": manifest.weight_bytes_per_token,
                "kv_cache": manifest.kv_bytes_per_token,
            },
            "precision": _fields(manifest, "bits", "block", "accuracy_level", "kv_dtype") | own_forms,
            "verified": manifest.parity is not None,
            "parity": None if manifest.parity is None else asdict(manifest.parity),
            "provenance": manifest.lineage,
            "onnxruntime_min": manifest.onnxruntime_min,
            "files": [asdict(file) for file in self.files],
        }

    def lines(self) -> list[str]:
        """Lines above the tables."""
        lines = [*summary(self.bundle, self.manifest), *_provenance_lines(self.manifest)]
        bad = [f"{file.name} ({file.state})" for file in self.files if file.state != "ok"]
        return lines + ([f"  DAMAGED: {', '.join(bad)}: export the bundle again"] if bad else [])

    def tables(self) -> list[Table]:
        """Tables for ``saap.cli.console.print_table``."""
        files = [[file.name, str(file.bytes), file.state] for file in self.files]
        return [_layer_table(self.manifest.layers), ("files", ["file", "bytes", "state"], files)]


def summary(bundle: Path, manifest: BundleManifest) -> list[str]:
    """Describe a bundle's sizes, precision and parity in lines."""
    size = sum(entry.bytes for name, entry in manifest.files.items() if ".onnx" in name)
    bits = " and ".join(map(str, sorted({manifest.bits, *manifest.lineage.get("matrices", {}).values()})))
    lines = [UNVERIFIED] if manifest.parity is None else []
    lines += [
        f"{bundle}: {manifest.model_type} for {manifest.target}, "
        f"{manifest.parameters / 1e6:.1f} M parameters in {len(manifest.layers)} layers, {size / 1e6:.1f} MB, "
        f"{bits} bit, hidden {manifest.hidden_size}, head {manifest.head_dim}, "
        f"vocabulary {manifest.vocab_size}, context {manifest.context_length}",
        f"  read per token: {manifest.weight_bytes_per_token / 1e6:.2f} MB of weights; written: "
        f"{manifest.kv_bytes_per_token} bytes of {manifest.kv_dtype} KV cache",
        f"  needs onnxruntime >= {manifest.onnxruntime_min}",
        f"  bundle hash {manifest.content_hash[:16]}",
    ]
    if own := Counter(manifest.lineage.get("matrices", {}).values()):
        linears = ", ".join(f"{count} of {own_bits} bits" for own_bits, count in sorted(own.items()))
        lines.append(f"  mixed: of the model's linears {linears}, the others of {manifest.bits}")
    if own := Counter(manifest.lineage.get("blocks", {}).values()):
        matrices = ", ".join(f"{count} in groups of {size}" for size, count in sorted(own.items()))
        lines.append(f"  mixed: of the model's matrices {matrices}, the others of {manifest.block}")
    if parity := manifest.parity:
        lines.append(
            f"  the graph computes what torch computes with the same integers: on {parity.tokens} tokens "
            f"({parity.sample}) logit difference {parity.max_abs_logit_difference:.2g}, KL {parity.kl:.2g}, top-1 "
            f"agreement {parity.top1_agreement:.2%}, perplexity x {parity.perplexity_ratio:.4f}"
        )
    return lines


def inspect_bundle(path: str | Path) -> Inspection:
    """Read a bundle's manifest and compare its files with their hashes, which reads them all.

    Raises BundleError: no bundle, or a manifest that is damaged or names files outside the bundle.
    """
    bundle = Bundle.open(path)
    files = [FileState(name, e.bytes, _state(bundle, name)) for name, e in sorted(bundle.manifest.files.items())]
    return Inspection(bundle.path, bundle.manifest, files)


def _fields(of: object, *names: str) -> dict[str, object]:
    return {name: getattr(of, name) for name in names}


def _state(bundle: Bundle, name: str) -> str:
    if not is_there(bundle.path / name):
        return "missing"
    try:
        bundle.file(name)
    except BundleError:
        return "differs from its hash"
    return "ok"


def _provenance_lines(manifest: BundleManifest) -> list[str]:
    """Describe the model's provenance, as far as it is known."""
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


def _layer_table(layers: list[LayerSizes]) -> Table:
    """One row for each run of equal layers; sizes that only some families have are left out where all are 0."""
    titles = {
        "query_heads": "query heads", "kv_heads": "KV heads", "conv": "convolution", "delta": "delta heads",
        "ffn": "FFN",
    }  # fmt: skip
    names = [n for n in titles if n not in ("conv", "delta") or any(getattr(layer, n) for layer in layers)]
    rows, first = [], 0
    for sizes, run in groupby([str(getattr(layer, name)) for name in names] for layer in layers):
        last = first + len(list(run)) - 1
        rows.append([f"{first}-{last}" if last > first else str(first), *sizes])
        first = last + 1
    return "layers", ["layers", *(titles[name] for name in names)], rows
