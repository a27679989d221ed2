"""Can the bench be believed? Its bars, measured on this machine, one finished trial per line of JSON.

    python -m studies.bench.study overhead BUNDLE                     harness against a bare ONNX Runtime loop
    python -m studies.bench.study llama FILE.gguf LLAMA_BENCH         adapter against llama.cpp's own bench
    python -m studies.bench.study memory BUNDLE                       against cgroup and smaps_rollup; needs root
    python -m studies.bench.study size A B --rounds 200               true ratio, and processes to resample
    python -m studies.bench.study trials A B --trials 60 --max-time 50  live verdicts of `saap compare A B`
    python -m studies.bench.study disturb BUNDLE --trials 20          neighbours, a memory hog, a throttled clock
    python -m studies.bench.study judge                              verdicts drawn from recorded processes; minutes
    python -m studies.bench.study table [--write]

Everything goes to cells/, so that a run can be interrupted and goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.measure.statistics import bootstrap_ratio, typical
from studies.common import Bar, add_write_option, bar_table, markdown, parser_of, show_tables

HERE = Path(__file__).resolve().parent
ROOT, OUT = HERE.parents[1], HERE / "cells"
LENGTHS = {"prompt": 16, "generate": 64, "threads": 1, "cold": False}


def microseconds(measurement) -> list[list[int]]:
    """Steps of every process, whole microseconds: what a verdict is made of, small enough to keep."""
    return [[round(t * 1e6) for t in s.token_s] for s in measurement.samples]


def append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def overhead(out: Path, bundle: str, rounds: int) -> None:
    """Interleaved fresh processes of both."""
    from bench.measure import BenchOptions, measure
    from saap.base.cores import choose_cores

    cpus = choose_cores(1)
    for index in range(len(records(out / "overhead.jsonl")), rounds):
        rates: dict[str, float] = {}

        def ours(rates=rates) -> None:
            plan = BenchOptions(prompt=128, generate=128, threads=1, repetitions=1, cold=False)
            rates["bench"] = measure([bundle], plan).measurements[0].decode_ts[0]

        def bare(rates=rates) -> None:
            command = [sys.executable, "-m", "studies.bench.bare_loop", bundle, 128, 128, 1, ",".join(map(str, cpus))]
            rates["bare"] = float(subprocess.run(list(map(str, command)), capture_output=True, check=True).stdout)

        for work in (ours, bare) if index % 2 else (bare, ours):
            work()
        append(out / "overhead.jsonl", rates)
        print(rates, flush=True)


def llama(out: Path, gguf: str, binary: str, rounds: int) -> None:
    from bench.measure import BenchOptions, measure
    from saap.base.cores import choose_cores

    cpus = ",".join(map(str, choose_cores(1)))
    for index in range(len(records(out / "llama.jsonl")), rounds):
        rates: dict[str, float] = {}

        def ours(rates=rates) -> None:
            plan = BenchOptions(prompt=0, generate=128, threads=1, repetitions=1, cold=False)
            rates["adapter"] = measure([f"llama.cpp:{gguf}"], plan).measurements[0].decode_ts[0]

        def theirs(rates=rates) -> None:
            command = ["taskset", "-c", cpus, binary, "-p", "0", "-n", "128", "-r", "1", "-t", "1", "-o", "json"]
            command += ["-m", gguf]
            rows = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            rates["llama-bench"] = rows[0]["avg_ts"]

        for work in (ours, theirs) if index % 2 else (theirs, ours):
            work()
        append(out / "llama.jsonl", rates)
        print(rates, flush=True)


IN_A_GROUP = """
import dataclasses, json, sys
from saap.base.cores import choose_cores
from bench.measure.worker import Repetition, sample
from export.engine.protocol import EngineOptions
job = Repetition("export.engine.onnxruntime", sys.argv[1], EngineOptions(1, 256), ["onnxruntime"], choose_cores(1),
                 prompt=list(range(128)), n_gen=128)
job.prepare()
print(json.dumps(dataclasses.asdict(sample(job).sample)), flush=True)
sys.stdin.read()
"""


def memory(out: Path, bundle: str) -> None:
    """Compare a worker's own numbers with its control group's and the kernel's sum, read from outside."""
    group = Path("/sys/fs/cgroup/memory/saap-bars")  # version 1
    if not group.parent.is_dir():
        group = Path("/sys/fs/cgroup/saap-bars")
    group.mkdir(exist_ok=True)
    command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', group, sys.executable, "-c", IN_A_GROUP, bundle]
    worker = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    sample = json.loads(worker.stdout.readline())
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    rollup = (Path("/proc") / str(worker.pid) / "smaps_rollup").read_text()
    resident = next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Rss:"))
    worker.communicate("")
    group.rmdir()
    record = {
        "anonymous": sample["anonymous_bytes"],
        "cgroup_anonymous": int(stat.get("total_rss") or stat["anon"]),
        "total": sample["anonymous_bytes"] + sample["file_bytes"],
        "smaps_rollup": resident,
    }
    record["anonymous_ratio"] = record["anonymous"] / record["cgroup_anonymous"]
    record["total_ratio"] = record["total"] / record["smaps_rollup"]
    append(out / "memory.jsonl", record)
    print(record)


def size(out: Path, a: str, b: str, rounds: int) -> None:
    """Many interleaved rounds, in pieces of ten."""
    from bench.measure import BenchOptions, measure

    path = out / f"size-{Path(a).name}-{Path(b).name}.jsonl"
    while sum(len(r["a"]) for r in records(path)) < rounds:
        result = measure([a, b], BenchOptions(**LENGTHS, repetitions=10), names=["a", "b"])
        measurements = {m.name: m for m in result.measurements}
        notes = {m.name: m.reasons for m in result.measurements}
        append(path, {name: microseconds(m) for name, m in measurements.items()} | {"reasons": notes})
        print(path.name, sum(len(r["a"]) for r in records(path)), flush=True)


def trials(out: Path, a: str, b: str, count: int, max_time: float) -> None:
    """Record the verdicts of `saap compare A B`, again and again."""
    from bench.judge.confirm import compare_live
    from bench.measure import BenchOptions, Result, measure

    def timed(specs: Sequence[str], plan: BenchOptions, names: Sequence[str] | None) -> Result:
        return measure(specs, plan, names=names)

    path = out / f"trials-{Path(a).name}-{Path(b).name}.jsonl"
    for _ in range(len(records(path)), count):
        begun = time.monotonic()
        live = compare_live([a, b], BenchOptions(**LENGTHS, max_time_s=max_time), timed, names=["a", "b"])
        (row,) = live.comparison.rows
        record = {
            "verdict": row.verdict,
            "ratio": row.ratio,
            "low": row.low,
            "high": row.high,
            "p": row.p_value,
            "seconds": time.monotonic() - begun,
            "reason": row.reason,
            "statuses": [[m.status for m in result.measurements] for result in live.results],
            "runs": [{m.name: microseconds(m) for m in result.measurements} for result in live.results],
        }
        append(path, record)
        shown = {key: value for key, value in record.items() if key != "runs"}
        print(shown, [len(run["a"]) for run in record["runs"]], flush=True)


def disturb(out: Path, bundle: str, count: int) -> None:
    """Two spinning processes, a process that takes memory, and a clock that falls, each begun in the middle."""
    from tests.support.disturbances import DISTURBANCES, judged_under

    path = out / "disturb.jsonl"
    for kind in DISTURBANCES:
        for _ in range(sum(r["kind"] == kind for r in records(path)), count):
            status, reasons = judged_under(kind, bundle)
            append(path, {"kind": kind, "status": status, "reasons": reasons})
            print(kind, status, reasons, flush=True)


def resampled(path: Path, rounds: int, draws: int = 2000) -> Iterator[bool]:
    """Whether `b` is called slower than `a`, for pairs whose rounds of whole processes are drawn from recorded ones."""
    import numpy as np

    from bench.judge.comparison import compare_within
    from bench.judge.verdict import SLOWER, confirmed
    from tests.support.bench_samples import measurement, result, sample

    pool = [pair for record in records(path) for pair in rounds_of(record)]
    random = np.random.default_rng(0)

    def drawn(chosen) -> Any:
        sides = [
            measurement(name, [], samples=[sample([t * 1e-6 for t in pool[i][side]], n) for n, i in enumerate(chosen)])
            for side, name in enumerate("ab")
        ]
        (row,) = compare_within(result(*[replace(m, n_gen=len(m.samples[0].token_s)) for m in sides]), "a", "b").rows
        return row

    for _ in range(draws):
        chosen = random.permutation(len(pool))[: 2 * rounds]
        first = drawn(chosen[:rounds])
        yield first.verdict == SLOWER and confirmed(first, drawn(chosen[rounds:])).verdict == SLOWER


def rounds_of(record: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    for run in record.get("runs", [record]):
        yield from zip(run["a"], run["b"], strict=False)


def ratio_of(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Second over first of the pairs, with its 95 % interval."""
    old, new = ([pair[side] for pair in pairs] for side in (0, 1))
    resamples = 2000 if len(pairs) <= 100 else 200  # the estimate looks at all pairs of pairs
    return bootstrap_ratio(old, new, paired=True, resamples=resamples)


def judge(out: Path, rounds: int, draws: int) -> None:
    """The true ratio of each pair of models, and what 2000 drawn verdicts say: minutes, so it is kept."""
    path = out / "judged.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for trials_path in sorted(out.glob("trials-*.jsonl")):
        if trials_path.stem not in known:
            pairs = [(typical(a), typical(b)) for record in records(trials_path) for a, b in rounds_of(record)]
            hits = sum(resampled(trials_path, rounds, draws))
            ratio = dict(zip(("ratio", "low", "high"), ratio_of(pairs), strict=True))
            known[trials_path.stem] = {**ratio, "pairs": len(pairs), "draws": draws, "slower": hits}
            path.write_text(json.dumps(known, indent=1) + "\n")
            print(trials_path.stem, known[trials_path.stem], flush=True)


def tables() -> dict[str, str]:
    """The tables of the README."""
    return {
        "overhead": overhead_table(),
        "verdicts": verdicts_table(),
        "disturbances": disturbances_table(),
    }


def overhead_table() -> str:
    """Show the bench's overhead, and whether its memory is the kernel's."""
    bare = [(r["bare"], r["bench"]) for r in records(OUT / "overhead.jsonl")]
    theirs = [(r["llama-bench"], r["adapter"]) for r in records(OUT / "llama.jsonl")]
    (memory,) = records(OUT / "memory.jsonl")
    (mean, low, high), (their, their_low, their_high) = ratio_of(bare), ratio_of(theirs)
    kernel = [memory["anonymous_ratio"], memory["total_ratio"]]
    bars = [
        Bar("decode in the bench over a bare ONNX Runtime loop", ">= 0.98", f"{mean:.3f} ({low:.3f} to {high:.3f})",
            mean >= 0.98),
        Bar("llama.cpp in the bench over its own llama-bench", "within 3 %",
            f"{their:.3f} ({their_low:.3f} to {their_high:.3f})", abs(their - 1) <= 0.03),
        Bar("anonymous memory over the control group's, all memory over smaps_rollup", "within 3 %",
            ", ".join(f"{share:.4f}" for share in kernel), all(abs(share - 1) <= 0.03 for share in kernel)),
    ]  # fmt: skip
    return bar_table(bars)


def verdicts_table() -> str:
    """Live verdicts of `saap compare`, and those of pairs drawn from the recorded processes."""
    judged = json.loads((OUT / "judged.json").read_text())
    lines = []
    for path in sorted(OUT.glob("trials-*.jsonl")):
        live, drawn = records(path), judged[path.stem]
        verdicts = {v: sum(r["verdict"] == v for r in live) for v in sorted({r["verdict"] for r in live})}
        true = f"{drawn['ratio']:.3f} ({drawn['low']:.3f} to {drawn['high']:.3f}; {drawn['pairs']} pairs)"
        shown = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        slower = f"{drawn['slower']} of {drawn['draws']}"
        lines.append([path.stem.removeprefix("trials-"), true, shown, f"{max(r['seconds'] for r in live):.0f}", slower])
    heads = ["pair", "true ratio of times (95 %)", "live verdicts", "longest, s", "called slower when drawn"]
    return markdown(heads, lines)


def disturbances_table() -> str:
    """Count how often a disturbance that began in the middle was named."""
    lines = []
    every = records(OUT / "disturb.jsonl")
    for kind in sorted({record["kind"] for record in every}):
        tries = [record for record in every if record["kind"] == kind]
        named = sum(r["status"] != "OK" and bool(r["reasons"]) for r in tries)  # kept are reasons of its kind only
        lines.append([kind, f"{named} of {len(tries)}", tries[-1]["reasons"][0]])
    return markdown(["disturbance", "named", "for example"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    work = {"overhead": 1, "llama": 2, "memory": 1, "size": 2, "trials": 2, "disturb": 1, "judge": 0, "table": 0}
    parser.add_argument("what", choices=list(work))
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--max-time", type=float, default=50)
    add_write_option(parser)
    args = parser.parse_args(arguments)
    if len(args.paths) != work[args.what]:
        parser.error(f"{args.what} takes {work[args.what]} paths")
    {
        "overhead": lambda: overhead(OUT, *args.paths, args.rounds),
        "llama": lambda: llama(OUT, *args.paths, args.rounds),
        "memory": lambda: memory(OUT, *args.paths),
        "size": lambda: size(OUT, *args.paths, args.rounds),
        "trials": lambda: trials(OUT, *args.paths, args.trials, args.max_time),
        "disturb": lambda: disturb(OUT, *args.paths, args.trials),
        "judge": lambda: judge(OUT, args.rounds, args.draws),
        "table": lambda: show_tables(HERE, tables(), args.write),
    }[args.what]()


if __name__ == "__main__":
    main()
