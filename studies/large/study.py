"""The costs of a large model on one machine: time, peak memory and disk of every command, by shape.

    python -m studies.large.study 1.1B 3B 7B 13B        # hours; finished phases are not run again
    python -m studies.large.study 7B --phases prune,export
    python -m studies.large.study 13B --phases prune,export                 # 62 GB of disk
    python -m studies.large.study table [--write]
    python -m studies.large.study plot studies/large/growth.png

A shape is a checkpoint of random weights (random_model.py), made for the time of its phases and removed after
them. A phase is one `saap` command in a process of its own: its seconds, the largest resident memory of it and its
children together, and by how much the file system filled while it ran. One JSON a phase in cells/.
The phase `llama` wants SAAP_PEER_PYTHON, an interpreter with llama-cpp-python.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from studies.common import ROOT, add_write_option, markdown, parser_of, provenance, show_tables
from studies.large.shapes import SHAPES

HERE = Path(__file__).resolve().parent
OUT, PLACE = HERE / "cells", ROOT / "out" / "large"
RATIO, SEQUENCES, LENGTH = 0.2, 10, 128
TEXT = ["--sequences", str(SEQUENCES), "--length", str(LENGTH)]
BENCH = ["-p", "16", "-n", "32", "-r", "8", "--no-cold"]
OF_DENSE = ("prune", "export-dense", "export-64", "export-128")
GROWING = ("prune", "export", "export-parity", "gguf", "tune")
POLL = 0.2  # seconds


def phases(place: Path) -> dict[str, list[str]]:
    """Arguments of `saap` by phase, in their order; later ones read what earlier ones wrote."""
    dense, slim, gguf = place / "dense", place / "slim", place / "dense.gguf"
    dense_bundles = [place / f"dense-int4{block}" for block in ("", "-64", "-128")]
    return {
        "prune": ["prune", dense, "-o", slim, "--ratio", str(RATIO), *TEXT, "--stream"],
        "export": ["export", slim, "-o", place / "slim-int4", "--parity", "none"],
        "export-parity": ["export", slim, "-o", place / "slim-int4-parity"],
        "export-dense": ["export", dense, "-o", place / "dense-int4", "--parity", "none"],
        "export-64": ["export", dense, "-o", place / "dense-int4-64", "--parity", "none", "--group-size", "64"],
        "export-128": ["export", dense, "-o", place / "dense-int4-128", "--parity", "none", "--group-size", "128"],
        "eval": ["eval", slim, "--max-chunks", "4", "--chunk", "128"],
        "bench": ["bench", place / "dense-int4", place / "slim-int4", *BENCH, "--json", place / "bench.json"],
        "gguf": ["export", dense, "-o", gguf, "--target", "gguf", "--type", "Q4_0", "--head-bits", "4"],
        "llama": ["bench", *dense_bundles, f"llama.cpp:{gguf}", *BENCH, "--json", place / "llama.json"],
        "tune": ["tune", slim, "-o", place / "tuned", "--tokens", "1024", "--length", "128", "--micro-batch", "2"],
    }  # fmt: skip


def sum_of(phase: str, place: Path) -> float | None:
    """The memory, MB, that saap says before it begins; None for `saap bench`, which has no torch and sums up itself."""
    from export.needs import export_needs
    from export.options import PARITY_ROWS, PARITY_TOKENS
    from saap.base.needs import fits
    from saap.models.architectures import shape_of
    from saap.models.checkpoint import read_config
    from saap.models.needs import eval_needs
    from saap.models.streaming import whole_needs
    from saap.models.weight_files import weights_bytes
    from saap.prune.needs import prune_needs
    from saap.quantize.bundle_size import bundle_size
    from saap.tune.needs import tune_needs

    dense, directory = place / "dense", place / ("dense" if phase in OF_DENSE else "slim")
    config = read_config(directory)
    shape = shape_of(config)
    if phase == "prune":
        return prune_needs(shape, SEQUENCES, LENGTH, weights_bytes(dense), streamed=True).memory_bytes / 1e6
    if phase.startswith("export"):
        tokens = PARITY_ROWS * PARITY_TOKENS if phase == "export-parity" else 0
        block = int(phase.split("-")[1]) if phase[-1].isdigit() else 32
        return export_needs(shape, bundle_size(config, 4, block).total(shape), tokens).memory_bytes / 1e6
    if phase == "tune":
        whole, single = (tune_needs(shape, 4, 32, 2 * LENGTH, streamed=each) for each in (False, True))
        return (whole if fits(whole) else single).memory_bytes / 1e6
    if phase == "eval":
        tokens = 4 * LENGTH
        return eval_needs(shape, tokens, streamed=not fits(whole_needs(directory))).memory_bytes / 1e6
    return None


def watched(arguments: list[Any], log: Path) -> dict[str, Any]:
    """Run one command to its end: seconds, peak memory of its processes, bytes that the disk filled by, exit code."""
    command = [sys.executable, "-m", "saap.cli", *map(str, arguments)]
    free, began = shutil.disk_usage(PLACE).free, time.monotonic()
    peak, least = 0, free
    with log.open("w") as output:
        empty = {**os.environ, "XDG_CACHE_HOME": str(log.parent / "cache")}  # of scores
        process = psutil.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=empty)
        while process.poll() is None:
            peak = max(peak, resident(process))
            least = min(least, shutil.disk_usage(PLACE).free)
            time.sleep(POLL)
    return {
        "seconds": round(time.monotonic() - began, 1), "peak_mb": round(peak / 1e6), "code": process.returncode,
        "disk_mb": round((free - least) / 1e6), "last": log.read_text(errors="replace").strip().splitlines()[-3:],
    }  # fmt: skip


def resident(process: psutil.Popen) -> int:
    """The most that a process held, bytes, and what its children hold now."""
    total = 0
    with contextlib.suppress(OSError, psutil.Error):
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        if most := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):  # not of one that has just ended
            total += 1024 * int(most[1])
        total += sum(child.memory_info().rss for child in process.children(recursive=True))
    return total


@contextmanager
def checkpoint(shape: str) -> Iterator[Path]:
    """The shape's folder with its dense model, for the time of the block."""
    place = PLACE / shape
    if not (place / "dense").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "studies.large.random_model", shape, place / "dense"]
        subprocess.run(command, check=True, cwd=ROOT)
    yield place
    shutil.rmtree(place)  # not where a phase failed or was interrupted: what is there is not made again


def measure(shape: str, names: list[str]) -> None:
    """The phases of one shape that are not known, or whose output is gone; the first that fails ends it."""
    cells = {name: OUT / f"{shape}-{name}.json" for name in names}
    if all(path.is_file() for path in cells.values()):
        return
    with checkpoint(shape) as place:
        weights = sum(path.stat().st_size for path in (place / "dense").glob("*.safetensors"))
        for name, arguments in phases(place).items():
            output = next((Path(a) for o, a in pairwise(arguments) if o == "-o"), None)
            if name not in names or (cells[name].is_file() and (output is None or output.exists())):
                continue
            expected = sum_of(name, place)
            numbers = {
                "sum_mb": None if expected is None else round(expected),
                **watched(arguments, place / f"{name}.log"),
            }
            last = " ".join(numbers.pop("last"))
            if numbers.pop("code"):
                raise SystemExit(f"{shape} {name} failed, and {place} is kept: {last}")
            cell = {"shape": shape, "phase": name, "weights_bytes": weights, **numbers}
            if name in ("bench", "llama"):
                cell["bench"] = rates(place / f"{name}.json")
            cell["bundle_bytes"] = {
                bundle.name: sum(path.stat().st_size for path in bundle.glob("*.onnx*"))
                for bundle in sorted(place.glob("*-int4*"))
            }
            cell |= {"cpus": psutil.cpu_count(logical=False), **provenance()}
            OUT.mkdir(parents=True, exist_ok=True)
            cells[name].write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
            print(f"{shape} {name}: {numbers['seconds']} s, {numbers['peak_mb']} MB", flush=True)


def rates(path: Path) -> list[dict[str, Any]]:
    """Decode speed and its ceiling, peak memory and validity of each bundle of a result."""
    from bench.measure.result import read_result

    result = read_result(path)
    return [
        {
            "name": m.name, "decode_ts": m.decode_ts, "ceiling_ts": result.ceiling_ts(m),
            "peak_bytes": m.peak("peak_decode_bytes"), "status": m.status, "reasons": m.reasons,
        }
        for m in result.measurements
    ]  # fmt: skip


def cells() -> list[dict[str, Any]]:
    """Return the cells by shape and phase."""
    documents = [json.loads(path.read_text()) for path in OUT.glob("*.json")]
    order = list(phases(Path()))
    return sorted(documents, key=lambda cell: (list(SHAPES).index(cell["shape"]), order.index(cell["phase"])))


def tables() -> dict[str, str]:
    """The tables of the README."""
    return {"commands": commands_table(), "decode": decode_table("llama", -1), "pruned": decode_table("bench", 0)}


def commands_table() -> str:
    """Time, memory and disk of every command."""
    lines = []
    for cell in cells():
        expected = f"{cell['sum_mb'] / 1e3:.1f}" if cell.get("sum_mb") else ""
        disk = f"{cell['disk_mb'] * 1e6 / cell['weights_bytes']:.2f}"
        steps = f", {cell['steps']} step" if "steps" in cell else ""
        row = [cell["shape"], cell["phase"] + steps, f"{cell['seconds']:.0f}", expected, f"{cell['peak_mb'] / 1e3:.1f}"]
        lines.append([*row, disk])
    return markdown(["shape", "command", "s", "said, GB", "peak, GB", "disk, x model"], lines)


def decode_table(phase: str, base: int) -> str:
    """Decode of the bundles of a phase, medians, and over one of them in pairs.

    Args:
        base: index of that one.
    """
    lines = []
    for cell in cells():
        for bundle in cell["bench"] if cell["phase"] == phase else []:
            median = statistics.median(bundle["decode_ts"])
            pairs = [a / b for a, b in zip(bundle["decode_ts"], cell["bench"][base]["decode_ts"], strict=False)]
            share = f"{median / bundle['ceiling_ts']:.0%}" if bundle["ceiling_ts"] else ""
            row = [cell["shape"], bundle["name"], f"{median:.1f}", f"{statistics.median(pairs):.2f}", share]
            lines.append([*row, f"{bundle['peak_bytes'] / 1e9:.1f}", bundle["status"]])
    over = "llama.cpp" if phase == "llama" else "dense"
    return markdown(["shape", "bundle", "tok/s", f"x {over}, median of pairs", "of the ceiling", "peak, GB", ""], lines)


def plot(path: str) -> None:
    """Seconds and peak memory of the phases that grow with the model, both axes logarithmic, beside straight growth."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (name, unit) in zip(axes, {"seconds": "seconds", "peak_mb": "peak memory, MB"}.items(), strict=True):
        for phase in GROWING:
            known = [(c["weights_bytes"] / 1e9, c[name]) for c in cells() if c["phase"] == phase]
            if len(known) > 1:
                axis.plot(*zip(*known, strict=True), marker="o", label=phase)
                (size, amount), most = known[0], known[-1][0]
                axis.plot([size, most], [amount, amount * most / size], color="0.7", linestyle=":", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="shape (weights in bfloat16, GB)", ylabel=unit)
        ticks = {c["weights_bytes"] / 1e9: c["shape"] for c in cells() if c["phase"] == "prune"}
        axis.set_xticks(list(ticks), [f"{shape}\n({size:.1f})" for size, shape in ticks.items()])
        axis.minorticks_off()
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", nargs="+", help="shapes; or table; or plot FILE")
    parser.add_argument("--phases", default=",".join(phases(Path())))
    add_write_option(parser)
    args = parser.parse_args(arguments)
    if args.what == ["table"]:
        return show_tables(HERE, tables(), args.write)
    if args.what[0] == "plot" and len(args.what) == 2:
        return plot(args.what[1])
    if wrong := [shape for shape in args.what if shape not in SHAPES]:
        parser.error(f"{wrong[0]} is no shape: give {', '.join(SHAPES)}, table, or plot FILE")
    if "SAAP_DATA" not in os.environ:
        raise SystemExit("set SAAP_DATA to the folder of texts that the cells are of")
    PLACE.mkdir(parents=True, exist_ok=True)
    for shape in args.what:
        measure(shape, args.phases.split(","))


if __name__ == "__main__":
    main()
