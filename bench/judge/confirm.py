"""A regression is said only when a fresh measurement says it too.

Most false alarms come from one run that something disturbed. A second one, made now, is disturbed in its own way: what
both say is true of the models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.judge.comparison import Comparison, compare, compare_within
from bench.judge.comparison import confirm as confirm_rows
from bench.judge.verdict import SLOWER, Verdict, confirmed
from bench.measure.options import BenchOptions
from bench.measure.result import Measurement, Result
from bench.measure.run import measure
from devices.common.progress import Progress
from devices.probe.host import probe
from export.bundle.manifest import BundleError, read_manifest

PREPACKED = "prepacked:"


@dataclass(frozen=True)
class Confirmed:
    """Verdicts, and the runs that they rest on."""

    comparison: Comparison
    results: list[Result]


def compare_live(
    specs: Sequence[str],
    plan: BenchOptions,
    min_effect: float = 0.02,
    *,
    confirm: bool = True,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Confirmed:
    """The second of two specs against the first, measured now and interleaved.

    Args:
        plan: of each of the at most two runs; its time limit too.
        min_effect: relative change below which a difference does not matter.
        confirm: run once more where something looks slower, and say so only when that run agrees.

    Raises:
        as bench.measure.run.measure.
    """
    first = measure(specs, plan, names=names, progress=progress)
    base, other = dict.fromkeys(m.name for m in first.measurements)
    comparison = compare_within(first, base, other, min_effect)
    if not (confirm and comparison.regressed):
        return Confirmed(comparison, [first])
    second = measure(specs, replace(plan, cold=False), names=[base, other], progress=progress)
    again = compare_within(second, base, other, min_effect)
    return Confirmed(confirm_rows(comparison, again), [first, second])


def confirm_files(
    comparison: Comparison, old: Result, new: Result, plan: BenchOptions, *, progress: Progress | None = None
) -> Confirmed:
    """Measure again what two result files call slower.

    Both specs where both are still what they were, interleaved; else the new one alone, against the old file. A row
    that cannot be measured again stays as it is, ``confirmed`` None and the reason said.

    Args:
        comparison: of ``compare(old, new)``.
        plan: its time limits and precision; lengths and threads are those of the files.
    """
    rows, results = [], []
    here = probe()["fingerprint"]
    for row in comparison.rows:
        if row.verdict != SLOWER:
            rows.append(row)
            continue
        before, after = _behind(row, row.against or row.name, old), _behind(row, row.name, new)
        obstacle = _gone(after, new, here)
        if obstacle:
            rows.append(replace(row, reason=f"not confirmed: {obstacle}"))
            continue
        both = _gone(before, old, here) is None
        fresh = measure(
            [before.spec, after.spec] if both else [after.spec],
            _plan_of(after, new, plan),
            names=["old", "new"] if both else [before.name],
            progress=progress,
        )
        results.append(fresh)
        again = (
            compare_within(fresh, "old", "new", comparison.min_effect)
            if both
            else compare(replace(old, measurements=[before]), fresh, comparison.min_effect)
        )
        rows.append(replace(confirmed(row, again.rows[0]), name=row.name, against=row.against))
    return Confirmed(replace(comparison, rows=rows), results)


def _behind(row: Verdict, name: str, result: Result) -> Measurement:
    return next(m for m in result.of(name) if (m.test, m.n_threads) == (row.setting, row.n_threads))


def _gone(m: Measurement, result: Result, here: str) -> str | None:
    """Why a spec cannot be measured again as it was; None when it can."""
    if result.device.get("fingerprint") != here:
        return "the results are of another device"
    return bundle_gone(m)


def bundle_gone(m: Measurement) -> str | None:
    """Why the bundle that was measured is not the one that its spec names now; None where it is."""
    if m.bundle_hash is None:
        return f"{m.spec} is no bundle, so it may have changed"
    try:
        manifest = read_manifest(Path(m.spec.split(":", 1)[-1] if m.kind != "onnx" else m.spec.removeprefix(PREPACKED)))
    except BundleError:
        return f"{m.spec} is not there any more"
    return None if manifest.content_hash == m.bundle_hash else f"{m.spec} is another bundle now"


def _plan_of(m: Measurement, result: Result, plan: BenchOptions) -> BenchOptions:
    return replace(
        plan, prompt=m.n_prompt, generate=m.n_gen, depth=m.n_depth, threads=m.n_threads, provider=m.provider,
        seed=result.settings.get("seed", 0), cold=False,
    )  # fmt: skip
