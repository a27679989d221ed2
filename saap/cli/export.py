"""``saap export``: a model directory to a bundle or a GGUF file, and what a bundle holds. The command line's room."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saap.cli.console import Console, print_table, shown
from saap.system.errors import UserError

if TYPE_CHECKING:
    import torch

PARITY_ROWS, PARITY_TOKENS = 4, 256
CACHE_ROWS = 16
DEFAULTS: dict[str, Any] = {
    "target": "cpu", "bits": None, "group": None, "head_bits": None, "kv": "32", "dotprod": True, "onnxruntime": None,
    "gguf_type": None, "parity": "full", "text": None,
}  # fmt: skip
BITS = {"cpu": (4, 8, 32), "cuda": (4, 8, 16), "portable": (4, 8, 32), "gguf": (4, 8, 16, 32)}


def inspect_step(bundle: Path, as_json: bool) -> None:
    """``saap export --inspect``."""
    from export.bundle.inspect import inspect_bundle, inspection_lines, inspection_tables

    report = inspect_bundle(bundle)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    for line in inspection_lines(report):
        click.echo(shown(line))
    for title, columns, rows in inspection_tables(report):
        print_table(title, columns, rows)


def export_step(model: str | Path, out: Path, options: dict[str, Any], console: Console) -> None:
    """``saap export``.

    Raises:
        UserError: options that do not go together, or no such model.
    """
    from saap.models.resolve import resolve
    from saap.system.outputs import check_output

    target = options["target"]
    if target != "gguf":
        check_output(out)
    bits = int(options["bits"]) if options["bits"] else None
    _check_options(target, bits, options)
    path = resolve(model, progress=console.report)
    if target == "gguf":
        _write_gguf(path, out, bits, options, console)
        return
    block = int(options["group"]) if options["group"] else None
    head_bits = int(options["head_bits"]) if options["head_bits"] else None
    parity = None if options["parity"] == "none" else _parity(path, options["text"], console)
    _check_needs(path, out, bits, block, options)
    common: dict[str, Any] = {"bits": bits, "block": block, "head_bits": head_bits, "parity": parity}
    if target == "portable":
        from export.portable.write import export_portable

        export_portable(path, out, **common, progress=console.report)
    else:
        from export.graph.targets import Target
        from export.write import export_bundle

        kv_bits = int(options["kv"])
        export_bundle(
            path, out, **common, kv_bits=kv_bits, target=Target(target, options["dotprod"], options["onnxruntime"]),
            calibration=parity_sample(path, options["text"], CACHE_ROWS)[0] if kv_bits == 8 else None,
            progress=console.report,
        )  # fmt: skip
    console.finish()
    show_bundle(out)


def _check_needs(path: Path, out: Path, bits: int | None, block: int | None, options: dict[str, Any]) -> None:
    """Refuse what memory or disk is too small for, before anything is written."""
    from export.needs import export_needs
    from saap.models.architectures import shape_of
    from saap.models.checkpoint import read_config
    from saap.quantize.bundle_size import bundle_size, tuned_bundle_size
    from saap.system.needs import check_disk, check_memory

    config = read_config(path)
    shape, written = shape_of(config), {None: 4, 16: 32}.get(bits, bits)
    if config.get("slim_quant"):
        size = tuned_bundle_size(config)
    else:
        size = bundle_size(config, written or 4, block or 32).total(shape)
    tokens = 0 if options["parity"] == "none" else PARITY_ROWS * PARITY_TOKENS
    needs = export_needs(shape, size, tokens)
    check_memory(needs, "exporting", "give --parity none" if tokens else "use a machine with more memory")
    check_disk(needs, out, "exporting")


def _check_options(target: str, bits: int | None, options: dict[str, Any]) -> None:
    if bits is not None and bits not in BITS[target]:
        allowed = ", ".join(map(str, BITS[target]))
        raise UserError(f"{bits} bits are not supported for the {target} target; allowed: {allowed}")
    of_cpu = {"--kv": options["kv"] != "32", "--no-dotprod": not options["dotprod"]}
    of_bundles = {"--ort": options["onnxruntime"], "--group": options["group"], "--parity": options["parity"] == "none"}
    wrong = [name for name, given in of_cpu.items() if given and target != "cpu"]
    wrong += [name for name, given in of_bundles.items() if given and target == "gguf"]
    if options["gguf_type"] and target != "gguf":
        wrong.append("--type")
    if wrong:
        raise UserError(f"{', '.join(wrong)} cannot be used with --target {target}: leave it out")


def _write_gguf(path: Path, out: Path, bits: int | None, options: dict[str, Any], console: Console) -> None:
    from export.gguf.write import BITS as KINDS
    from export.gguf.write import export_gguf
    from saap.models.checkpoint import read_config

    tuned_bits = (read_config(path).get("slim_quant") or {}).get("bits")
    # Tuned integers know the type that holds them best.
    kind = options["gguf_type"] or (KINDS[bits] if bits and bits != tuned_bits else None)
    head_kind = KINDS[int(options["head_bits"])] if options["head_bits"] else None
    report = export_gguf(path, out, kind=kind, head_kind=head_kind, progress=console.report)
    console.finish()
    click.echo(
        f"{report['file']}: {report['bytes'] / 1e6:.1f} MB, {report['architecture']}, {report['layers']} layers, "
        f"{report['kind'] or 'as tuned'}"
    )
    for what, key in (("carried over", "worst_error_carried"), ("rounded anew", "worst_error_rounded")):
        if report[key] is not None:
            click.echo(f"  largest relative error of a matrix whose groups were {what}: {report[key]:.2g}")
    for note in report["notes"]:
        click.echo(f"  note: {note}")


def _parity(path: Path, text: str | None, console: Console) -> Callable[[Path], dict[str, Any]]:
    from export.parity.verify import check_parity

    def check(bundle: Path) -> dict[str, Any]:
        ids, sample = parity_sample(path, text, PARITY_ROWS)
        return check_parity(bundle, path, ids, sample, progress=console.report)

    return check


def parity_sample(path: Path, text: str | None, rows: int) -> tuple[torch.Tensor, str]:
    """Rows to compare graphs on: real text where there is some, else random tokens."""
    import torch

    from saap.models.architectures import positions_of
    from saap.models.checkpoint import read_config
    from saap.models.resolve import load_tokenizer
    from saap.text.documents import load_documents, pack

    documents = load_documents(text, split="calibration")
    config = read_config(path)
    length = min(PARITY_TOKENS, positions_of(config))
    if documents is not None:
        return pack(documents.texts, load_tokenizer(path), length, rows, 1), documents.source
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config["vocab_size"], (rows, length), generator=generator), "random tokens"


def show_bundle(bundle: Path) -> None:
    """One paragraph about a bundle."""
    from export.bundle.manifest import read_manifest

    manifest = read_manifest(bundle)
    size = sum(entry.bytes for name, entry in manifest.files.items() if ".onnx" in name)
    parity = manifest.parity
    bits = " and ".join(map(str, sorted({manifest.bits, *manifest.lineage.get("matrices", {}).values()})))
    click.echo(
        f"{bundle}: {manifest.parameters / 1e6:.1f} M parameters, {bits} bit, {size / 1e6:.1f} MB, "
        f"{manifest.weight_bytes_per_token / 1e6:.1f} MB read per token"
    )
    if parity is None:
        click.echo("  UNVERIFIED: parity with the torch model was not checked (--parity none)")
    else:
        click.echo(
            f"  parity on {parity['tokens']} tokens ({parity['sample']}): logit difference "
            f"{parity['max_abs_logit_difference']:.2g}, top-1 agreement {parity['top1_agreement']:.2%}, "
            f"perplexity x {parity['perplexity_ratio']:.4f}"
        )
