"""Every parser of a file or an answer that somebody else may have written, with valid documents for it.

A target reads bytes. It may return, or raise an error that is meant for a person (with ``exit_code``); anything else
is a finding.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        read: is given bytes.
        seeds: valid documents.
        kind: how documents are changed, one of :data:`studies.fuzz.mutations.CHANGES`.
        share: of the documents that each target is given.
        others: documents of other kinds, given in its place now and then.
    """

    name: str
    read: Callable[[bytes], Any]
    seeds: tuple[bytes, ...]
    kind: str = "json"
    share: float = 1
    others: tuple[bytes, ...] = ()


def is_for_people(error: BaseException) -> bool:
    """Whether an error is meant for a person: one line with an exit code."""
    return getattr(error, "exit_code", None) is not None


@contextmanager
def folder() -> Iterator[Path]:
    """A folder in memory for a target's files."""
    place = Path(tempfile.mkdtemp(prefix="saap-fuzz-", dir=RUN))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def targets(place: Path) -> dict[str, Target]:
    """All of them by name.

    Args:
        place: a folder for the files that are read.
    """
    every = [*_documents(place), *_rows(place), *_lines(place), *_binaries(place), _arguments(place)]
    return {target.name: target for target in every}


def _from_file(path: Path, read: Callable[[], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        path.write_bytes(data)
        return read()

    path.parent.mkdir(parents=True, exist_ok=True)
    return parse


def _json(*documents: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(document).encode() for document in documents)


def _documents(place: Path) -> Iterator[Target]:
    """Files of JSON and TOML."""
    from bench.judge.baselines import read_baselines
    from bench.judge.quality import compare_quality, read_quality
    from bench.measure.result import read_result
    from bench.runtimes.peers import genai_peer
    from devices.profiles.profile import PROFILES, read_profile
    from export.bundle import Bundle
    from export.bundle.tokenizer import BundleTokenizer
    from saap.base.quality import QUALITY
    from saap.cli.report import make_report
    from saap.models.architectures import positions_of, shape_of
    from saap.models.checkpoint import read_config
    from saap.models.integrity import check_directory
    from saap.models.record import read_record
    from saap.models.shape import LayerSizes, ModelShape
    from saap.prune.search.layer_costs import read_costs
    from studies.fuzz import seeds

    here = place / "bundle"
    yield Target(
        "bundle.json",
        _from_file(here / "bundle.json", lambda: Bundle.open(here).check()),
        _json(seeds.MANIFEST),
    )
    here2 = place / "slim"

    def slim() -> Any:
        record = read_record(here2)
        check_directory(here2)
        return record

    yield Target("saap.json", _from_file(here2 / "saap.json", slim), _json(seeds.RECORD))
    here3 = place / "config"

    def sizes() -> Any:
        config = read_config(here3)
        return shape_of(config), positions_of(config)

    yield Target("config.json", _from_file(here3 / "config.json", sizes), _json(*seeds.CONFIGS))
    cost = place / "cost.json"
    shape = ModelShape(hidden=576, head_dim=64, vocab=49152, tied=True, layers=())

    def costs() -> Any:
        table = read_costs(cost, shape, bits=4, group_size=32)
        return table.layer_ms(LayerSizes(9, 3, 512))

    yield Target("cost.json", _from_file(cost, costs), _json(seeds.COSTS))
    result = place / "result.json"
    yield Target("result", _from_file(result, lambda: read_result(result)), _json(seeds.RESULT))
    page = place / "report.html"
    yield Target("report of a result", _from_file(result, lambda: make_report([result], page)), _json(seeds.RESULT))
    quality = place / "quality.json"

    def judge() -> Any:
        return compare_quality(read_quality(quality), QUALITY.convert(seeds.QUALITY))

    yield Target("quality", _from_file(quality, judge), _json(seeds.QUALITY))
    baselines = place / "baselines"
    yield Target(
        "baseline", _from_file(baselines / "a.ff.json", lambda: read_baselines(baselines, "a")), _json(seeds.BASELINE)
    )
    profile = place / "board.toml"
    texts = tuple(path.read_bytes() for path in sorted(PROFILES.glob("*.toml"))[:4])
    yield Target("profile", _from_file(profile, lambda: read_profile(profile)), texts, kind="bytes")
    tokens = place / "tokenizer"

    def tokenizer() -> Any:
        loaded = BundleTokenizer(tokens)
        return loaded.encode("a b"), loaded.chat_template

    yield Target("tokenizer.json", _from_file(tokens / "tokenizer.json", tokenizer), _json(seeds.TOKENIZER))
    tokens2 = place / "tokenizer-config"
    tokens2.mkdir(parents=True, exist_ok=True)
    (tokens2 / "tokenizer.json").write_text(json.dumps(seeds.TOKENIZER))

    def chat() -> Any:
        loaded = BundleTokenizer(tokens2)
        return loaded.chat([{"role": "user", "content": "a"}]) if loaded.chat_template else loaded.encode("a")

    yield Target(
        "tokenizer_config.json", _from_file(tokens2 / "tokenizer_config.json", chat), _json(seeds.TOKENIZER_CONFIG)
    )
    genai = place / "genai"
    yield Target(
        "genai_config.json",
        _from_file(genai / "genai_config.json", lambda: genai_peer(f"genai:{genai}", 16)),
        _json({"model": {"vocab_size": 10, "context_length": 100, "decoder": {"filename": "model.onnx"}}}),
    )


def _rows(place: Path) -> Iterator[Target]:
    """Data to learn from and questions."""
    from saap.evaluate.tasks import FIELDS, read_task
    from saap.text.conversations import is_conversation, messages_of
    from saap.text.documents import checked_text, load_documents, load_rows
    from studies.fuzz import seeds

    data = place / "data.jsonl"

    def chats() -> Any:
        rows = load_rows(data, split="tuning") or []
        talks = [(w, messages_of(row, w)) for w, row in rows if is_conversation(row)]
        return [checked_text(turn["content"], w).encode() for w, talk in talks for turn in talk]

    yield Target("text rows", _from_file(data, lambda: load_documents(data, split="tuning")), _json(*seeds.CHATS))
    yield Target("chat rows", _from_file(data, chats), _json(*seeds.CHATS))
    for task in ("piqa", "hellaswag", "winogrande"):
        row = {"label": 0} | {field: ["a", "b"] if field == "choices" else "a _ b" for field in FIELDS[task]}
        questions = place / f"{task}.json"
        read = _from_file(questions, lambda task=task, path=questions: read_task(task, path))
        yield Target(f"questions of {task}", read, _json([row, row]))


def _lines(place: Path) -> Iterator[Target]:
    """Output of programs on a board."""
    from bench.power.commands import pmic_watts
    from devices.probe.jetson import power_mode, power_modes
    from devices.probe.tegrastats import parse_tegrastats
    from studies.fuzz import seeds

    def text(data: bytes) -> str:
        return data.decode(errors="replace")

    def watts(data: bytes) -> float | None:
        try:
            return pmic_watts(text(data))
        except ValueError:  # what its caller expects where there is no rail
            return None

    nowhere = Path("/nonexistent")
    yield Target("tegrastats", parse_tegrastats, seeds.TEGRASTATS, kind="bytes")
    yield Target(
        "nvpmodel",
        lambda data: power_mode(nowhere, lambda command: text(data)),
        (b"NV Power Mode: 25W\n1\n",),
        kind="bytes",
    )
    yield Target(
        "vcgencmd pmic_read_adc",
        watts,
        (b"   VDD_CORE_A current(7)=2.55A\n VDD_CORE_V volt(15)=0.87V\n",),
        kind="bytes",
    )
    config = place / "etc/nvpmodel.conf"
    modes = _from_file(config, lambda: power_modes(place))
    yield Target("nvpmodel.conf", modes, (b"< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n",), kind="bytes")


def _binaries(place: Path) -> Iterator[Target]:
    """ONNX, GGUF and safetensors."""
    from export.bundle import foreign_graph
    from saap.base.gguf_header import read_header
    from saap.models.gguf import read_tokenizer_fields
    from saap.models.weight_files import tensor_reader
    from saap.system.sealed_tensors import load_sealed
    from studies.fuzz import seeds

    gguf = place / "model.gguf"
    yield Target("GGUF header", _from_file(gguf, lambda: read_header(gguf)), seeds.gguf(place), kind="bytes")
    yield Target(
        "GGUF tokenizer", _from_file(gguf, lambda: read_tokenizer_fields(gguf)), seeds.gguf(place), kind="bytes"
    )
    graph = place / "graph/model.onnx"
    yield Target("ONNX data files", _from_file(graph, lambda: foreign_graph(graph)), seeds.onnx_graphs(), kind="bytes")
    (graph.parent / "w.data").write_bytes(bytes(8))
    weights = place / "weights/model.safetensors"

    def tensors() -> Any:
        names, read = tensor_reader(weights.parent)
        return [read(name).shape for name in names[:4]]

    yield Target("safetensors", _from_file(weights, tensors), seeds.safetensors(), kind="bytes")

    def sealed(data: bytes) -> Any:
        try:
            return load_sealed(data)
        except ValueError:  # what its callers expect of a damaged cache
            return None

    yield Target("cached tensors", sealed, seeds.sealed(place), kind="bytes")


def _arguments(place: Path) -> Target:
    """The command line: words that it knows, numbers and noise; nothing may run for long."""
    import contextlib
    import sys

    from saap.cli import main as cli

    def run(data: bytes) -> None:
        before, output = sys.argv, io.StringIO()
        sys.argv = ["saap", *(word.replace("\x00", "") for word in data.decode(errors="replace").split("\n"))]
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                cli.invoke()
        except SystemExit as stop:
            if stop.code not in (0, 1, 2, 3):
                raise RuntimeError(f"exit {stop.code}") from None
        finally:
            sys.argv = before

    absent = str(place / "absent")
    words = [
        ["prune", absent, "-o", absent, "--ratio", "0.2"], ["tune", absent, "-o", absent, "--bits", "4"],
        ["export", absent, "-o", absent, "--target", "gguf"], ["eval", absent, "--chunk", "16"],
        ["bench", absent, "--threads", "1", "--json", "-"], ["compare", absent, absent],
        ["report", absent, "-o", absent], ["devices", "check", absent, "--device", "raspberry-pi-5"],
        ["devices", "show", "orin"], ["generate", absent, "x"], ["run", absent, "-o", absent, "--speedup", "1.5"],
    ]  # fmt: skip
    return Target("arguments", run, tuple("\n".join(line).encode() for line in words), kind="bytes")
