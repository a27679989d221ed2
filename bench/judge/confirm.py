"""A regression is said only when a fresh measurement says it too.

Most false alarms come from one run that something disturbed. A second one, made now, is disturbed in its own way: what
both say is true of the models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.judge.comparison import Comparison, Runs, compare, compare_within, runs_of
from bench.judge.comparison import confirm as confirm_rows
from bench.judge.verdict import CANNOT_TELL, SLOWER, Verdict, confirmed
from bench.measure.options import BenchOptions
from bench.measure.result import Measurement, Result
from devices.probe.host import probe
from export.bundle.manifest import BundleError, read_manifest

Measure = Callable[[Sequence[str], BenchOptions, Sequence[str] | None], Result]  # measures specs under names


@dataclass(frozen=True)
class Confirmed:
    """Verdicts, and the runs that they rest on."""

    comparison: Comparison
    results: list[Result]


def compare_live(
    specs: Sequence[str],
    plan: BenchOptions,
    measure: Measure,
    min_effect: float = 0.02,
    *,
    confirm: bool = True,
    names: Sequence[str] | None = None,
) -> Confirmed:
    """Compare the second of two specs with the first, measured now and interleaved.

    Args:
        plan: of each of the at most two runs; its time limit too.
        min_effect: relative change below which a difference does not matter.
        confirm: run once more where something looks slower, and say so only when that run agrees.
    """
    first = measure(specs, plan, names)
    base, other = dict.fromkeys(m.name for m in first.measurements)
    comparison = compare_within(first, base, other, min_effect)
    if not (confirm and comparison.regressed):
        return Confirmed(comparison, [first])
    second = measure(specs, replace(plan, cold=False), [base, other])
    again = compare_within(second, base, other, min_effect)
    return Confirmed(confirm_rows(comparison, again), [first, second])


def confirm_files(comparison: Comparison, old: Runs, new: Runs, plan: BenchOptions, measure: Measure) -> Confirmed:
    """Measure again what results call slower, and what they cannot tell.

    Two bundles that are still what they were are measured interleaved. Where the old one is gone, or it was the same,
    the new one alone is measured against the old runs; that says nothing where the runs before said nothing. A row that
    cannot be measured again stays as it is, ``confirmed`` None and the reason said.

    Args:
        comparison: of ``compare(old, new)``.
        plan: its time limits and precision; lengths and threads are those of the results.
    """
    rows, results = [], []
    here, olds, news = probe()["fingerprint"], runs_of(old), runs_of(new)
    for row in comparison.rows:
        if row.verdict not in (SLOWER, CANNOT_TELL):
            rows.append(row)
            continue
        before, after = _behind(row, row.against or row.name, olds), _behind(row, row.name, news)[-1]
        (then,), (now,) = before[-1].measurements, after.measurements
        obstacle = _gone(now, after, here)
        both = not obstacle and then.bundle_hash != now.bundle_hash and not _gone(then, before[-1], here)
        if obstacle or (row.verdict == CANNOT_TELL and not both):
            rows.append(replace(row, reason=f"not confirmed: {obstacle}") if row.verdict == SLOWER else row)
            continue
        specs, names = ([then.spec, now.spec], ["old", "new"]) if both else ([now.spec], [then.name])
        fresh = measure(specs, _plan_of(now, after, plan), names)
        results.append(fresh)
        least = comparison.min_effect
        again = compare_within(fresh, "old", "new", least) if both else compare(before, fresh, least)
        verdict = confirmed(row, again.rows[0]) if row.verdict == SLOWER else again.rows[0]
        rows.append(replace(verdict, name=row.name, against=row.against))
    return Confirmed(replace(comparison, rows=rows), results)


def _behind(row: Verdict, name: str, runs: Sequence[Result]) -> list[Result]:
    """Return the runs that a row rests on, each with its one measurement."""
    results = []
    for run in runs:
        some = [m for m in run.of(name) if (m.test, m.n_threads) == (row.setting, row.n_threads)]
        results += [replace(run, measurements=some[:1])] if some else []
    return results


def _gone(m: Measurement, result: Result, here: str) -> str | None:
    """Say why a spec cannot be measured again as it was; None when it can."""
    if result.device.get("fingerprint") != here:
        return "the results are of another device"
    return bundle_gone(m)


def bundle_gone(m: Measurement) -> str | None:
    """Say why the bundle that was measured is not the one that its spec names now; None where it is."""
    if m.bundle_hash is None:
        return f"{m.spec} is no bundle, so it may have changed"
    try:
        manifest = read_manifest(Path(m.spec.split(":", 1)[-1] if m.kind != "onnx" else m.spec))
    except BundleError:
        return f"{m.spec} is not there any more"
    return None if manifest.content_hash == m.bundle_hash else f"{m.spec} is another bundle now"


def _plan_of(m: Measurement, result: Result, plan: BenchOptions) -> BenchOptions:
    return replace(
        plan, prompt=m.n_prompt, generate=m.n_gen, depth=m.n_depth, threads=m.n_threads, provider=m.provider,
        seed=result.settings.get("seed", 0), cold=False,
    )  # fmt: skip
