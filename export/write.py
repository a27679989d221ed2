"""Export a model: a bundle of graphs for ONNX Runtime, or one file for llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from export.bundle.manifest import MANIFEST, BundleManifest, Spelling, write_manifest
from export.bundle.tokenizer import BundleTokenizer, ids_of
from export.clients import write_client_files
from export.engines import check_engines, engine_nll, engines_of, write_engine
from export.gguf.llama_cpp import quantize, quantizer
from export.gguf.write import BITS as GGUF_TYPES
from export.gguf.write import GGUFReport, export_gguf
from export.graph_writer import GraphWriter
from export.needs import export_needs
from export.options import LLAMA_CPP_TYPES, PARITY_ROWS, PARITY_TOKENS, ExportOptions
from export.parity.verify import check_parity
from export.source import ModelSource, sized_manifest
from saap.base.errors import UserError
from saap.base.files import calling
from saap.base.needs import check_disk, check_memory
from saap.base.options import refuse_unused
from saap.base.outputs import GGUF, check_place
from saap.base.progress import Progress
from saap.base.writing import beside, check_output, claimed, read_object, writing_directory, writing_file
from saap.models.architectures import positions_of, shape_of
from saap.models.checkpoint import read_config
from saap.models.directory import copy_sidecars
from saap.models.record import Integers, read_record
from saap.models.resolve import resolve
from saap.models.slim_quant import quant_of
from saap.models.weight_files import weights_hash
from saap.quantize.bundle_size import bundle_size, tuned_bundle_size
from saap.quantize.groups import IntegerForm
from saap.quantize.integers import write_integers
from saap.system.processes import computing_on
from saap.text.documents import load_documents, pack, samples_of
from saap.text.encoding import check_ids, encode, tokenizer_for, writing_tokenizer

CACHE_ROWS = 16
GPTQ_ROWS = 16  # of PARITY_TOKENS each
SPELT = 200_000  # characters of the text whose tokens are counted: a second

Rows = Callable[[int], tuple[torch.Tensor, str]]  # that many rows of ids [rows, tokens], and where they come from


@dataclass(frozen=True)
class ExportResult:
    """The output of :func:`export`."""

    path: Path  # the bundle, or the GGUF file
    manifest: BundleManifest | None = None  # the bundle's ``bundle.json``; None for a GGUF file
    gguf: GGUFReport | None = None  # what became of the matrices in a GGUF file; None for a bundle


def export(
    model: str | Path, options: ExportOptions | None = None, *, output: str | Path, progress: Progress | None = None
) -> ExportResult:
    """Write a model as a bundle, its parity with the torch model checked, or as a GGUF file.

    Args:
        model: a dense, slim or tuned directory, a GGUF file, a packaged name or a hub id.
        output: the bundle's directory, or the GGUF file; it appears when it is complete.

    Raises UserError: options that do not go together, no such model, one that cannot be exported, too little memory or
    disk, or a graph that does not compute what the model computes.
    """
    output, options = Path(output), options or ExportOptions()
    if options.target != "gguf":
        check_output(output, model, options.text, record=MANIFEST)
    else:
        check_place(output, GGUF, model)
    options.check()
    path = resolve(model, progress=progress)
    if options.target == "gguf":
        return ExportResult(output, gguf=_write_gguf(path, output, options, progress))
    check_needs(path, output, options)
    check_engines(path, options)

    def rows(count: int) -> tuple[torch.Tensor, str]:
        return sample_rows(path, options.text, count)[:2]

    with _integers(path, output, options, progress) as source:
        return ExportResult(output, write_bundle(source, output, options, rows, progress))


@contextmanager
def _integers(path: Path, output: Path, options: ExportOptions, progress: Progress | None) -> Iterator[Path]:
    """Yield the directory to write: where floats become integers, one whose integers the text has chosen."""
    source = ModelSource(path)
    if source.quant:
        refuse_unused(options, ("integers",), f"floats, and {path} holds integers")
    if source.quant or options.integers == "nearest":
        yield path
        return
    precision = graph_writer(source, replace(options, kv_bits=32)).precision  # which refuses what cannot be written
    if precision.bits not in (4, 8):
        yield path
        return
    form = IntegerForm(precision.bits, precision.group_size, precision.head_bits, own=source.own_forms(precision))
    with claimed(output), beside(output, "integers") as place:
        sample = sample_rows(path, options.text, GPTQ_ROWS, PARITY_ROWS)
        about = Integers(source=sample.source, text_sha256=sample.text_sha256)
        with computing_on(options.device):
            directory = write_integers(path, place / "model", form, sample.ids, about, progress)
        with calling(directory, path):
            yield directory


def _write_gguf(path: Path, out: Path, options: ExportOptions, progress: Progress | None) -> GGUFReport:
    quant = quant_of(read_config(path))
    if options.integers == "llama.cpp":
        if quant:
            refuse_unused(options, ("integers",), f"floats, and {path} holds integers")
        return _quantized_gguf(path, out, options, progress)
    tuned_bits = quant["bits"] if quant else None
    # Tuned integers know the type that holds them best.
    by_bits = GGUF_TYPES[options.bits] if options.bits and options.bits != tuned_bits else None
    head_kind = GGUF_TYPES[options.head_bits] if options.head_bits else None
    return export_gguf(path, out, kind=options.gguf_type or by_bits, head_kind=head_kind, progress=progress)


def _quantized_gguf(path: Path, out: Path, options: ExportOptions, progress: Progress | None) -> GGUFReport:
    """Write a file of floats, and let llama.cpp quantize it as a person would without us."""
    python, kind = quantizer(), options.gguf_type or LLAMA_CPP_TYPES[options.bits or 4]
    with claimed(out), beside(out, "floats") as place:
        floats = export_gguf(path, place / "model.gguf", kind="F16", progress=progress)
        with writing_file(out) as partial:
            quantize(floats.file, partial, kind, python)
    return replace(floats, file=out, bytes=out.stat().st_size, kind=kind, tensors={}, worst_error_rounded=None)


def write_bundle(
    directory: Path, out: Path, options: ExportOptions, rows: Rows | None = None, progress: Progress | None = None
) -> BundleManifest:
    """Write a model directory as a bundle: weights, two graphs, tokenizer, client configuration, manifest.

    ``rows``: what parity is checked on and an int8 cache scaled with; without them neither can be.

    Raises:
        UserError: unsupported architecture, precision, sizes or target, or graphs that compute something else.
        RunError: a tokenizer, or ids that end a text, that cannot be read.
    """
    source = ModelSource(directory)
    calibration = rows(CACHE_ROWS)[0] if rows is not None and options.kv_bits == 8 else None
    writer = graph_writer(source, options, calibration)
    parity = rows(PARITY_ROWS) if rows is not None and options.parity == "full" else None
    with writing_directory(out) as partial_out:
        copy_sidecars(source.directory, partial_out)
        read = writer.write(partial_out, progress)
        manifest = _manifest(source, writer, read, options.target)
        write_client_files(partial_out, source.config, manifest)
        if parity is not None:
            write_manifest(partial_out, manifest)
            with computing_on(options.device):
                report = check_parity(partial_out, source.directory, *parity, progress=progress)
            manifest = replace(manifest, parity=report)
        for row in engines_of(source.directory, options):
            ids = parity[0] if parity is not None else None
            exported = write_engine(row, source, partial_out, options, progress)
            exported |= {"nll": engine_nll(row, partial_out, ids, manifest.parity, progress)}
            engines = {**manifest.lineage.get("engines", {}), row.name: exported}
            manifest = replace(manifest, lineage={**manifest.lineage, "engines": engines})
        return write_manifest(partial_out, manifest)


def graph_writer(source: ModelSource, options: ExportOptions, calibration: torch.Tensor | None = None) -> GraphWriter:
    """Return the writer of a model's graphs, before any weights are read.

    Raises:
        UserError: as :func:`write_bundle`.
        RunError: a tokenizer, or ids that end a text, that cannot be read.
    """
    writer = GraphWriter(source, options, calibration)
    _eos_ids(source)
    if (source.directory / "tokenizer.json").is_file():
        BundleTokenizer(source.directory)
    return writer


class SampleRows(NamedTuple):
    """Ids [rows, tokens] of a text, its name and its hash."""

    ids: torch.Tensor
    source: str
    text_sha256: str


def sample_rows(directory: Path, text: str | None, rows: int, least: int | None = None) -> SampleRows:
    """Rows of text to choose integers by, and to compare graphs on; ``least`` are enough where a text gives no more.

    Raises UserError: no such text, or one that the tokenizer does not know.
    """
    documents = load_documents(text, split="calibration")
    length = min(PARITY_TOKENS, positions_of(read_config(directory)))
    tokenizer = tokenizer_for(directory, documents.texts, documents.source)
    try:
        ids = pack(documents.texts, tokenizer, length, rows, 1)
    except UserError:
        if least is None:
            raise
        ids = pack(documents.texts, tokenizer, length, least, 1)
    check_ids(ids, directory)
    return SampleRows(ids, documents.source, documents.sha256)


def check_needs(directory: Path, out: Path, options: ExportOptions) -> None:
    """Refuse what memory or disk is too small for, before anything is written."""
    config = read_config(directory)
    shape = shape_of(config)
    if config.get("slim_quant"):
        size = tuned_bundle_size(config)
    else:
        bits = {None: 4, 16: 32}.get(options.bits, options.bits) or 4
        size = bundle_size(config, bits, options.group_size or 32).total(shape)
        if bits == 4:  # of which some matrices may be planned in 8
            size = max(size, int(read_record(directory).get("plan", {}).get("achieved", {}).get("bytes") or 0))
    tokens = 0 if options.parity == "none" else PARITY_ROWS * PARITY_TOKENS
    needs = export_needs(shape, size, tokens)
    if not config.get("slim_quant") and options.integers == "gptq" and options.bits not in (16, 32):
        needs = replace(needs, disk={**needs.disk, "the integers that text chooses": size})
    check_memory(needs, "exporting", "give --parity none" if tokens else "use a machine with more memory")
    check_disk(needs, out, "exporting")


def spelling_of(directory: Path) -> Spelling | None:
    """Measure the characters per token of a text that neither chose the model's vocabulary nor tuned it."""
    documents = samples_of("evaluation")
    text = documents.text[:SPELT]
    try:
        count = len(encode(text, writing_tokenizer(directory)))
    except UserError:  # no tokenizer, or one that cannot be used
        return None
    return Spelling(documents.source, len(text) / count) if count else None


def _manifest(source: ModelSource, writer: GraphWriter, bytes_per_token: int, target: str) -> BundleManifest:
    """Build the manifest without its files and parity."""
    precision, config, record = writer.precision, source.transformers_config, read_record(source.directory)
    windows = [layer.window for layer in source.traits.layers]
    return replace(
        sized_manifest(source.shape, precision, config),
        target=target,
        words=source.traits.vocabulary,
        spelling=spelling_of(source.directory),
        windows=windows if target == "cpu" and any(windows) else [],
        weight_bytes_per_token=bytes_per_token,
        bos_token_id=next(iter(_ids_of(source, "begins", config.bos_token_id)), None),
        eos_token_ids=_eos_ids(source),
        onnxruntime_min=writer.onnxruntime_min,
        lineage={
            "model_sha256": record.get("integers", {}).get("from_sha256") or weights_hash(source.directory),
            **({"integers": record["integers"]} if "integers" in record else {}),
            "head_bits": precision.head_bits,
            **({"matrices": precision.matrices} if precision.matrices else {}),
            **({"blocks": precision.blocks} if precision.blocks else {}),
            "method": record.get("method"),
            "plan": {key: value for key, value in record.get("plan", {}).items() if not isinstance(value, list)},
            "tuning": record.get("tuning", {}).get("text"),
            **record.get("lineage", {}),
        },
    )


def _eos_ids(source: ModelSource) -> list[int]:
    """Every id that ends a text: generation_config.json knows more of them than config.json."""
    ids, path = source.transformers_config.eos_token_id, source.directory / "generation_config.json"
    if path.is_file():
        ids = read_object(path, "get or make the model again").get("eos_token_id", ids)
    return _ids_of(source, "ends", ids)


def _ids_of(source: ModelSource, what: str, ids: object) -> list[int]:
    """Ids that the model names. Raises UserError: one that its vocabulary does not have."""
    numbers, most = ids_of(ids, source.directory, what), source.shape.vocab
    if beyond := [each for each in numbers if each >= most]:
        raise UserError(
            f"{source.directory} {what} a text with the token {beyond[0]}, and its vocabulary has {most}: get it again"
        )
    return numbers
