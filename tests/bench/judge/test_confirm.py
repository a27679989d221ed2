from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.bench_samples import measurement, result
from support.tiny_graphs import tiny_bundle

from bench.judge import confirm
from bench.judge.comparison import compare
from bench.judge.verdict import CANNOT_TELL, NOT_COMPARABLE, SAME, SLOWER
from bench.measure.options import BenchOptions
from bench.measure.result import INVALID, Result
from devices.probe.host import probe
from export.bundle.manifest import read_manifest

BASE = [0.0100, 0.0101, 0.0099, 0.0102, 0.0100, 0.0098, 0.0101, 0.0100]
SETTING = {"n_prompt": 8, "n_gen": 4}


class Machine:
    """Stands in for bench(): each run gives the next of ``scales``, by which the second spec is slower."""

    def __init__(self, *scales: float, **fields: object) -> None:
        self.scales, self.fields, self.asked = list(scales), fields, []

    def __call__(self, specs: Sequence[str], plan: BenchOptions, names: Sequence[str] | None = None) -> Result:
        self.asked.append((list(specs), plan, names))
        scale = self.scales.pop(0)
        names = names or [Path(spec).name for spec in specs]
        factors = [1.0, scale] if len(specs) == 2 else [scale]
        return result(
            *[measurement(n, [f * t for t in BASE], **self.fields) for n, f in zip(names, factors, strict=True)],
            fingerprint=probe()["fingerprint"],
        )


def test_a_slow_down_is_measured_twice() -> None:
    there = Machine(1.10, 1.08)
    live = confirm.compare_live(["a", "b"], BenchOptions(max_time_s=9), there)
    (row,) = live.comparison.rows
    assert (row.verdict, row.confirmed, len(live.results)) == (SLOWER, True, 2)
    assert row.ratio == pytest.approx(1.08)  # of the run that was not picked for it
    assert there.asked[1][1].max_time_s == 9 and there.asked[1][1].cold is False


def test_one_that_does_not_come_again_is_none() -> None:
    (row,) = confirm.compare_live(["a", "b"], BenchOptions(), Machine(1.10, 1.001)).comparison.rows
    assert (row.verdict, row.confirmed) == (SAME, False)
    assert "did not confirm" in row.reason


@pytest.mark.parametrize(("scale", "options"), [(1.0, {}), (0.9, {}), (1.1, {"confirm": False})])
def test_nothing_else_is_measured_twice(scale: float, options: dict[str, bool]) -> None:
    there = Machine(scale)
    assert len(confirm.compare_live(["a", "b"], BenchOptions(), there, **options).results) == len(there.asked) == 1


def test_a_second_run_that_is_invalid_leaves_it_open() -> None:
    there = Machine(1.1, 1.1)

    def second_is_invalid(specs: Sequence[str], plan: BenchOptions, names: Sequence[str] | None) -> Result:
        timed = there(specs, plan, names)
        spoilt = [replace(m, status=INVALID, reasons=["the host swapped"]) for m in timed.measurements]
        return replace(timed, measurements=spoilt) if len(there.asked) == 2 else timed

    comparison = confirm.compare_live(["a", "b"], BenchOptions(), second_is_invalid).comparison
    assert comparison.rows[0].verdict == NOT_COMPARABLE and "the host swapped" in comparison.rows[0].reason
    assert comparison.exit_code(True) == 3


@pytest.fixture
def files(tmp_path: Path):
    """Two results of two bundles that are still there, the new one a fifth slower."""

    def of(name: str, scale: float) -> Result:
        bundle = tiny_bundle(tmp_path / name, seed=len(name))
        m = measurement("model", [scale * t for t in BASE], spec=str(bundle))
        m = replace(m, bundle_hash=read_manifest(bundle).content_hash)
        return result(m, fingerprint=probe()["fingerprint"], settings={"seed": 3})

    return of("old", 1.0), of("newer", 1.2)


def test_files_are_confirmed_by_both_bundles_interleaved(files) -> None:
    there = Machine(1.09)
    found = confirm.confirm_files(compare(*files), *files, BenchOptions(max_time_s=7), there)
    (row,) = found.comparison.rows
    assert (row.verdict, row.confirmed, row.name) == (SLOWER, True, "model")
    ((specs, plan, names),) = there.asked
    assert [Path(spec).name for spec in specs] == ["old", "newer"] and names == ["old", "new"]
    assert (plan.prompt, plan.generate, plan.threads, plan.seed, plan.max_time_s) == (8, 4, 1, 3, 7)


def test_or_by_the_new_bundle_alone(files, tmp_path: Path) -> None:
    (tmp_path / "old" / "bundle.json").unlink()
    there = Machine(1.0)
    (row,) = confirm.confirm_files(compare(*files), *files, BenchOptions(), there).comparison.rows
    assert (row.verdict, row.confirmed) == (CANNOT_TELL, False) and "a second run cannot tell" in row.reason
    assert len(there.asked[0][0]) == 1


def test_what_results_cannot_tell_is_measured_where_both_bundles_are_there(files) -> None:
    old, new = files
    new = replace(new, measurements=[replace(new.measurements[0], samples=old.measurements[0].samples)])
    assert compare(old, new).open
    (row,) = confirm.confirm_files(compare(old, new), old, new, BenchOptions(), Machine(1.0)).comparison.rows
    assert (row.verdict, row.test, row.name) == (SAME, "wilcoxon", "model")
    there = Machine()
    same = replace(new, measurements=[replace(new.measurements[0], bundle_hash=old.measurements[0].bundle_hash)])
    (row,) = confirm.confirm_files(compare(old, same), old, same, BenchOptions(), there).comparison.rows
    assert row.verdict == CANNOT_TELL and there.asked == []  # what was of one bundle then is not judged by it now


def test_or_not_at_all(files, tmp_path: Path) -> None:
    there = Machine()
    old, new = files
    tiny_bundle(tmp_path / "newer", seed=99)
    (row,) = confirm.confirm_files(compare(old, new), old, new, BenchOptions(), there).comparison.rows
    assert (row.verdict, row.confirmed) == (SLOWER, None) and "another bundle now" in row.reason
    elsewhere = [replace(r, device={"fingerprint": "e" * 16}) for r in files]
    (row,) = confirm.confirm_files(compare(*elsewhere), *elsewhere, BenchOptions(), there).comparison.rows
    assert row.verdict == SLOWER and "another device" in row.reason
    foreign = [replace(r, measurements=[replace(r.measurements[0], bundle_hash=None)]) for r in files]
    (row,) = confirm.confirm_files(compare(*foreign), *foreign, BenchOptions(), there).comparison.rows
    assert row.verdict == SLOWER and "may have changed" in row.reason
    assert there.asked == []
