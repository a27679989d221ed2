"""Documents inside whole products: one file of a bundle, a model directory or a measurement is changed, the hashes are
made right again, and the command that a user would give is run on the product.

The products are those of ``tests/support/old/760273a``. Commands run in this process, up to the first tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saap.base.child import absent
from saap.base.errors import UserError
from studies.fuzz.targets import Target

OLD = Path(__file__).resolve().parents[2] / "tests" / "support" / "old" / "760273a"
Run = Callable[[], object]


def products(place: Path) -> dict[str, Target]:
    """All of them by name.

    Args:
        place: a folder for the products that are changed.
    """
    shutil.copytree(OLD, place, dirs_exist_ok=True)
    for copy, source in json.loads((OLD.parent / "copies.json").read_text(encoding="utf-8")).items():
        if copy.startswith(OLD.name):  # a file of several products is kept once
            shutil.copy(OLD.parent / source, place / Path(copy).relative_to(OLD.name))
    every = [*_ggufs(place), *_measurements(place), *_models(place), *_bundles(place)]
    return {target.name: target for target in every}


def saap(*words: object, codes: Sequence[int] = (0, 2)) -> None:
    """A command in this process.

    Raises:
        UserError: it is refused in one line.
        RuntimeError: it ends otherwise than with a result or one line.
    """
    from saap.cli import main

    before, output, errors = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["saap", *map(str, words)]
    code: object = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main.invoke()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    if code not in codes:
        raise RuntimeError(f"exit {code}: {errors.getvalue()[-500:]}")
    if code == 2:
        line = errors.getvalue().splitlines()[-1:]
        if not (line and line[0].startswith("saap: ")):
            raise RuntimeError(f"exit 2 says: {errors.getvalue()[-500:]}")
        raise UserError(line[0])


@dataclass(frozen=True)
class Changed:
    """Puts a document into its product, seals that, and runs one of the commands: always the same for a document.

    Attributes:
        seal: makes the hashes right again once the file is changed.
        pack: makes a document what is in the file.
    """

    path: Path
    seal: Callable[[Path], None]
    runs: tuple[Run, ...]
    pack: Callable[[bytes], bytes] | None = None

    def __call__(self, data: bytes) -> object:
        good = self.path.read_bytes() if self.path.is_file() else None
        self.path.write_bytes(data if self.pack is None else self.pack(data))
        try:
            self.seal(self.path)
            return self.runs[zlib.crc32(data) % len(self.runs)]()
        finally:  # a product is shared by targets
            self.path.unlink()
            if good is not None:
                self.path.write_bytes(good)

    def check(self) -> None:
        """Run every command on the product as it was made.

        Raises UserError: one is refused, and so would try nothing.
        """
        for run in dict.fromkeys(self.runs):
            run()


def _sealed(record: str) -> Callable[[Path], None]:
    """Give a changed file the size and hash that its product's record has of it; a changed record keeps none."""

    def seal(path: Path) -> None:
        sealing = path.parent / record
        if path == sealing:
            with contextlib.suppress(ValueError, RecursionError):
                document = json.loads(path.read_bytes())
                if isinstance(document, dict) and document.pop("checksum", None):
                    path.write_text(json.dumps(document))
            return
        document = json.loads((OLD / path.parent.name / record).read_bytes())
        data = path.read_bytes()
        document.pop("checksum")
        document["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        sealing.write_text(json.dumps(document))

    return seal


def _unsealed(path: Path) -> None:
    """A document that carries its own checksum loses it."""
    _sealed(path.name)(path)


def _bundles(place: Path) -> Iterator[Target]:
    """Each file of a bundle."""
    import numpy as np
    import torch

    from bench.measure.worker import timed_pass
    from bench.runtimes.peers import read_peers
    from export.engine import huge_pages
    from saap.evaluate.subjects import Bundle

    bundle = place / "bundle"
    huge_pages.collapse = lambda: 0  # moves all of this process's memory to huge pages, for every document

    def generate() -> None:
        saap("generate", bundle, "a b", "--raw", "--max-tokens", 2, "--threads", 1, "--sample", "--seed", 0)

    def chat() -> None:
        saap("generate", bundle, "a b", "--max-tokens", 2, "--threads", 1)

    def bench() -> None:
        (peer,) = read_peers([str(bundle)], 16)
        timed_pass(peer.job(1, 16).open(), np.arange(4), 2, lambda: 0.0)

    def score() -> None:
        scored = Bundle("a", bundle)
        (
            scored.size(),
            scored.positions(),
            scored.lineage(),
            scored.scorer(torch.device("cpu"))(torch.arange(8).reshape(1, 8)),
        )

    def inspect() -> None:
        saap("export", bundle, "--inspect")

    def fit() -> None:
        saap("devices", "check", bundle, "--device", "raspberry-pi-5", codes=(0, 1, 2))

    def genai() -> None:
        read_peers([f"genai:{bundle}"], 16)

    def optimum() -> None:
        if not absent(["optimum.onnxruntime"]):
            read_peers([f"optimum:{bundle}"], 16)

    runs: dict[str, tuple[str, float, tuple[Run, ...]]] = {
        "bundle.json": ("values", 1, (generate, bench, score, inspect, fit, genai)),
        "tokenizer.json": ("values", 1, (generate, generate, inspect)),
        "tokenizer_config.json": ("values", 7, (generate,)),
        "special_tokens_map.json": ("values", 7, (generate,)),
        "generation_config.json": ("values", 7, (generate,)),
        "genai_config.json": ("values", 6, (generate, genai)),
        "config.json": ("values", 6, (generate, optimum)),
        "model.onnx": ("graph", 1, (generate, generate, bench, inspect)),
        "scoring.onnx": ("graph", 0.75, (score, score, inspect)),
        "model.onnx.data": ("bytes", 0.1, (generate, bench)),
        "chat_template.jinja": ("bytes", 0.02, (chat,)),
    }
    others = tuple((bundle / name).read_bytes() for name in runs if name.endswith("json"))
    for name, (kind, share, commands) in runs.items():
        path = bundle / name
        seed = path.read_bytes() if path.is_file() else b"{% for m in messages %}{{ m.content }}{% endfor %}"
        read = Changed(path, _sealed("bundle.json"), commands)
        yield Target(f"bundle: {name}", read, (seed,), kind, share, others if kind == "values" else ())


def _models(place: Path) -> Iterator[Target]:
    """Each document of a dense, a slim and a tuned directory."""
    import torch

    from saap.models.architectures import positions_of, traits_of
    from saap.models.checkpoint import read_config
    from saap.models.streaming import load_streamed
    from saap.prune.options import PruneOptions
    from saap.prune.pruning import budget_of

    text = place / "judge.txt"

    def commands(model: Path) -> tuple[Run, ...]:
        out = place / "out"

        def evaluate() -> None:
            saap("eval", model, "--text", text, "--chunk", 16, "--max-chunks", 1)

        def export(*words: object) -> None:
            try:
                saap("export", model, "-o", out / "x.gguf", *words)
            finally:
                shutil.rmtree(out, ignore_errors=True)

        def prune() -> None:
            budget_of(model, PruneOptions(ratio=0.2))
            traits_of(config := read_config(model))
            positions_of(config)

        def stream() -> None:
            load_streamed(model)(torch.arange(8).reshape(1, 8))

        portable = ("--target", "portable", "--parity", "none")
        runs: tuple[Run, ...] = (
            evaluate, lambda: export("--target", "gguf"), lambda: export("--parity", "none"), lambda: export(*portable),
        )  # fmt: skip
        return runs if model.name == "tuned" else (*runs, prune, prune, prune, stream)  # which are for floats

    for kind in ("dense", "slim", "tuned"):
        model = place / kind
        runs = commands(model)
        seal = _sealed("saap.json") if kind != "dense" else (lambda path: None)
        names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
        names += ["special_tokens_map.json"] + ([] if kind == "dense" else ["saap.json"])
        others = tuple((model / name).read_bytes() for name in names)
        for name in names:
            share = 0.25 if name in ("config.json", "saap.json") else 0.05
            read = Changed(model / name, seal, runs)
            yield Target(f"{kind}: {name}", read, ((model / name).read_bytes(),), "values", share, others)
        header, pack = _safetensors(model / "model.safetensors")
        read = Changed(model / "model.safetensors", seal, runs, pack)
        yield Target(f"{kind}: model.safetensors", read, (header,), "values", 0.1)
    names = json.loads(_safetensors(place / "dense/model.safetensors")[0])
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    path, runs = place / "dense/model.safetensors.index.json", commands(place / "dense")
    read = Changed(path, lambda path: None, runs)
    yield Target("dense: model.safetensors.index.json", read, (json.dumps(index).encode(),), "values", 0.05)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "/etc", "r": 8, "auto_mapping": {"a": "b"}}
    read = Changed(place / "slim/adapter_config.json", lambda path: None, commands(place / "slim"))
    yield Target("slim: adapter_config.json", read, (json.dumps(adapter).encode(),), "values", 0.05)


def _safetensors(path: Path) -> tuple[bytes, Callable[[bytes], bytes]]:
    """The header of a file of tensors, and what puts another header before the same data."""
    whole = path.read_bytes()
    (size,) = struct.unpack_from("<Q", whole)
    return whole[8 : 8 + size], lambda header: struct.pack("<Q", len(header)) + header + whole[8 + size :]


def _measurements(place: Path) -> Iterator[Target]:
    """Results, qualities, tables of costs and baselines."""
    from bench.judge.baselines import read_baselines
    from bench.judge.regression import retest
    from bench.report.verdicts import DEVICE, device_junit, sentence, verdict_table
    from saap.cli.prune import for_this_machine
    from saap.prune.options import PruneOptions
    from saap.prune.pruning import budget_of

    def compare(kind: str) -> tuple[Run, ...]:
        changed, good, out = place / f"{kind}.json", OLD / f"{kind}.json", place / f"{kind}-out.json"
        words = ("--json", out) if kind == "quality" else ("--json", out, "--no-confirm", "--junit", place / "out.xml")
        return (
            lambda: saap("compare", good, changed, *words, codes=(0, 2, 3)),
            lambda: saap("compare", changed, good, *words, codes=(0, 2, 3)),
        )

    for kind in ("result", "quality"):
        path, page = place / f"{kind}.json", place / "out.html"
        seeds = (path.read_bytes(),)
        yield Target(kind, Changed(path, _unsealed, compare(kind)), seeds, "values", 1)

        def report(path: Path = path, page: Path = page) -> None:
            saap("report", path, "-o", page)

        yield Target(f"{kind}: report", Changed(path, _unsealed, (report,)), seeds, "values", 0.005)

    costs = place / "cost.json"

    asked = PruneOptions(speedup=1.1, costs=costs)

    def plan() -> None:
        budget_of(place / "dense", asked)

    def plan_here() -> None:
        budget_of(place / "dense", for_this_machine(asked))

    yield Target("cost.json", Changed(costs, _unsealed, (*[plan] * 9, plan_here)), (costs.read_bytes(),), "values", 1)
    folder = place / "baselines"
    (path,) = folder.glob("*.json")
    (good,) = read_baselines(folder, "bundle")

    def test() -> None:
        outcome = retest(read_baselines(folder, "bundle"), lambda plan: good.results[0])
        verdict_table(outcome.checks, DEVICE), list(map(sentence, outcome.checks)), device_junit(outcome)

    yield Target("baseline", Changed(path, _unsealed, (test,)), (path.read_bytes(),), "values", 1)


def _ggufs(place: Path) -> Iterator[Target]:
    """A GGUF file as its header's structure: names, types, values and lengths."""
    from bench.runtimes.peers import PeerError, read_peers

    path, cache = place / "model.gguf", place / "cache"
    saap("export", place / "dense", "-o", path, "--target", "gguf", "--bits", 8, codes=(0,))
    structure, weights = gguf_structure(path)

    def pack(document: bytes) -> bytes:
        return gguf_bytes(json.loads(document), weights)

    def peer() -> None:
        with contextlib.suppress(PeerError, UserError):  # the second where llama.cpp is not installed
            read_peers([f"llama.cpp:{path}"], 16)

    def convert() -> None:
        from saap.models.resolve import resolve

        try:
            resolve(path, cache_dir=cache)
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    yield Target("GGUF: header", Changed(path, lambda path: None, (peer,), pack), (structure,), "values", 1)
    yield Target("GGUF: model", Changed(path, lambda path: None, (convert,), pack), (structure,), "values", 0.1)


_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def gguf_structure(path: Path) -> tuple[bytes, bytes]:
    """The header of a GGUF file as JSON, and the data behind it."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    pairs = []
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            pairs.append({"key": name, "types": [int(kind) for kind in field.types], "value": field.contents()})
    tensors = [
        {"name": each.name, "shape": [int(n) for n in each.shape], "type": int(each.tensor_type),
         "offset": int(each.data_offset) - int(reader.data_offset)}
        for each in reader.tensors
    ]  # fmt: skip
    data = path.read_bytes()[int(reader.data_offset) :]
    whole = {"version": 3, "n_tensors": len(tensors), "n_pairs": len(pairs), "pairs": pairs, "tensors": tensors}
    return json.dumps(whole).encode(), data


def gguf_bytes(document: Any, data: bytes) -> bytes:
    """A GGUF file of a document whose parts may be anything: what does not fit its type is written as 0."""
    document = document if isinstance(document, dict) else {}
    pairs, tensors = _list(document.get("pairs")), _list(document.get("tensors"))
    head = bytearray(b"GGUF" + _scalar("I", document.get("version")))
    head += _scalar("Q", document.get("n_tensors")) + _scalar("Q", document.get("n_pairs"))
    for pair in pairs[:100_000]:
        pair = pair if isinstance(pair, dict) else {}
        types = _list(pair.get("types")) or [4]
        head += _string(pair.get("key")) + _value(types, pair.get("value"))
    for tensor in tensors[:100_000]:
        tensor = tensor if isinstance(tensor, dict) else {}
        shape = _list(tensor.get("shape"))
        head += _string(tensor.get("name")) + _scalar("I", len(shape)) + b"".join(_scalar("Q", n) for n in shape)
        head += _scalar("I", tensor.get("type")) + _scalar("Q", tensor.get("offset"))
    return bytes(head) + bytes(-len(head) % 32) + data


def _value(types: list[Any], value: object) -> bytes:
    kind, *inner = types
    head = _scalar("I", kind)
    if kind == 9:
        values, inner = _list(value), inner or [4]
        each = [_value(inner, one)[4:] for one in values[:100_000]]
        return head + _scalar("I", inner[0]) + _scalar("Q", len(values)) + b"".join(each)
    return head + (_string(value) if kind == 8 else _scalar(_GGUF_SCALARS.get(_hashable(kind), "I"), value))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _hashable(value: object) -> Any:
    return value if isinstance(value, int) else None


def _string(value: object) -> bytes:
    data = (value if isinstance(value, str) else str(value)[:100]).encode(errors="surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _scalar(code: str, value: object) -> bytes:
    try:
        return struct.pack("<" + code, value)
    except (struct.error, OverflowError):
        size = struct.calcsize("<" + code)
        return (value % (1 << 8 * size)).to_bytes(size, "little") if isinstance(value, int) else bytes(size)
