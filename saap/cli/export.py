"""``saap export``: a model directory to a bundle or a GGUF file, and what a bundle holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export.options import ExportOptions
from saap.cli.console import Console, print_table, shown
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import directory

if TYPE_CHECKING:
    import torch

PARITY_ROWS, PARITY_TOKENS = 4, 256
CACHE_ROWS = 16


@click.command(cls=OptionsCommand)
@click.argument("model")
@options_of(ExportOptions)
@click.option("-o", "--out", type=directory, help="The bundle (or the .gguf file) to write.")
@click.option("--inspect", is_flag=True, help="Write nothing: show what is in the bundle MODEL.")
@click.option("--json", "as_json", is_flag=True, help="With --inspect, for machines.")
def export(model: str, out: Path | None, inspect: bool, as_json: bool, options: ExportOptions) -> None:
    """Write a model (directory, GGUF file or name) as a bundle, with parity checked; or look into a bundle.

    \b
    Example:
      saap export out/tuned -o out/bundle
      saap export smollm2-135m -o out/dense
      saap export out/slim -o out/slim.gguf --target gguf --bits 8
      saap export --inspect out/bundle
    """
    if inspect:
        show_inside(Path(model), as_json)
        return
    if out is None:
        raise click.UsageError("give -o OUT, where the bundle should be written, or --inspect to look into one")
    with Console() as console:
        export_model(model, out, options, console)


def show_inside(bundle: Path, as_json: bool) -> None:
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


def export_model(model: str | Path, out: Path, options: ExportOptions, console: Console) -> None:
    """Export, and show what was written.

    Raises:
        UserError: options that do not go together, or no such model.
    """
    from saap.models.resolve import resolve
    from saap.system.files import check_output

    if options.target != "gguf":
        check_output(out)
    options.check()
    path = resolve(model, progress=console.report)
    if options.target == "gguf":
        _write_gguf(path, out, options, console)
        return
    parity = None if options.parity == "none" else _parity(path, options.text, console)
    _check_needs(path, out, options)
    if options.target == "portable":
        from export.portable.write import export_portable

        export_portable(
            path, out, bits=options.bits, block=options.group_size, head_bits=options.head_bits, parity=parity,
            progress=console.report,
        )  # fmt: skip
    else:
        from export.graph.targets import Target
        from export.write import export_bundle

        export_bundle(
            path, out, bits=options.bits, block=options.group_size, head_bits=options.head_bits, parity=parity,
            kv_bits=options.kv_bits, target=Target(options.target, options.dotprod, options.onnxruntime),
            calibration=parity_sample(path, options.text, CACHE_ROWS)[0] if options.kv_bits == 8 else None,
            progress=console.report,
        )  # fmt: skip
    console.finish()
    show_bundle(out)


def _check_needs(path: Path, out: Path, options: ExportOptions) -> None:
    """Refuse what memory or disk is too small for, before anything is written."""
    from export.needs import export_needs
    from saap.models.architectures import shape_of
    from saap.models.checkpoint import read_config
    from saap.quantize.bundle_size import bundle_size, tuned_bundle_size
    from saap.system.needs import check_disk, check_memory

    config = read_config(path)
    shape = shape_of(config)
    if config.get("slim_quant"):
        size = tuned_bundle_size(config)
    else:
        written = 32 if options.bits == 16 else options.bits or 4
        size = bundle_size(config, written, options.group_size or 32).total(shape)
    tokens = 0 if options.parity == "none" else PARITY_ROWS * PARITY_TOKENS
    needs = export_needs(shape, size, tokens)
    check_memory(needs, "exporting", "give --parity none" if tokens else "use a machine with more memory")
    check_disk(needs, out, "exporting")


def _write_gguf(path: Path, out: Path, options: ExportOptions, console: Console) -> None:
    from export.gguf.write import BITS as KINDS
    from export.gguf.write import export_gguf
    from saap.models.checkpoint import read_config

    tuned_bits = (read_config(path).get("slim_quant") or {}).get("bits")
    # Tuned integers know the type that holds them best.
    kind = options.gguf_type or (KINDS[options.bits] if options.bits and options.bits != tuned_bits else None)
    head_kind = KINDS[options.head_bits] if options.head_bits else None
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
