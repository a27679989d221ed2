from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bench_samples import measurement, result, sample
from support.command_line import here

from bench.judge import compare
from bench.judge.comparison import CompareError, Comparison, compare_within, confirm, decisive_values, noise_floor
from bench.judge.verdict import CANNOT_TELL, FASTER, NOT_COMPARABLE, SAME, SLOWER, Verdict, confirmed
from bench.measure.result import INVALID, Result, ResultError, write_result
from bench.measure.statistics import RUN_DEVIATION

BASE = [0.0100, 0.0101, 0.0099, 0.0102, 0.0100, 0.0098]


def _run(scale: float, **fields: Any) -> Result:
    return result(measurement("m", [scale * t for t in BASE], **fields))


@pytest.mark.parametrize(
    ("scale", "min_effect", "verdict"),
    [(0.8, 0.02, FASTER), (1.25, 0.02, SLOWER), (1.0, 0.02, CANNOT_TELL), (1.04, 0.02, CANNOT_TELL), (1.04, 0.2, SAME)],
)
def test_verdicts_of_two_runs_know_that_runs_differ(scale: float, min_effect: float, verdict: str) -> None:
    (row,) = compare(_run(1.0), _run(scale), min_effect).rows
    assert (row.verdict, row.setting, row.what, row.test) == (verdict, "pp8+tg4", "decode", "runs")
    assert row.ratio == pytest.approx(scale) and row.speedup == pytest.approx(1 / scale)
    assert row.low <= row.ratio <= row.high and row.visible > RUN_DEVIATION
    assert (row.reason is None) == (verdict != CANNOT_TELL)


@pytest.mark.parametrize(
    ("moved", "scale", "verdict"),
    [(0.002, 1.04, SLOWER), (0.002, 1.0, SAME), (0.03, 1.04, CANNOT_TELL), (0.03, 1.0, CANNOT_TELL)],
)
def test_folders_of_runs_tell_how_much_runs_differ(tmp_path: Path, moved: float, scale: float, verdict: str) -> None:
    folders = [tmp_path / "old", tmp_path / "new"]
    for folder, by in zip(folders, (1.0, scale), strict=True):
        folder.mkdir()
        for number, side in enumerate((-1, 0, 1)):
            write_result(folder / f"{number}.json", _run(by * (1 + side * moved)))
    (row,) = compare(*folders).rows
    assert (row.verdict, row.ratio) == (verdict, pytest.approx(scale, rel=0.01))


def test_runs_that_do_not_compare_are_left_out() -> None:
    elsewhere = replace(_run(2.0), device={"fingerprint": "e" * 16})
    spoilt = _run(2.0, status=INVALID, reasons=["the host swapped"])
    (row,) = compare([_run(1.0), elsewhere, spoilt, _run(1.0)], _run(1.25)).rows
    assert (row.verdict, row.ratio) == (SLOWER, pytest.approx(1.25))
    with pytest.raises(ResultError, match="holds no results"):
        compare(_run(1.0), Path(__file__).parents[1] / "judge")


def test_files_compare_as_the_results_in_them(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for path, scale in ((old, 1.0), (new, 1.25)):
        write_result(path, _run(scale))
    assert compare(old, str(new)) == compare(_run(1.0), _run(1.25)) and compare(old, new).regressed


def test_noise_wider_than_the_difference_cannot_be_told() -> None:
    noisy, other = [0.008, 0.014, 0.010, 0.009, 0.013], [0.009, 0.015, 0.011, 0.008, 0.013]
    (row,) = compare(result(measurement("m", noisy)), result(measurement("m", other))).rows
    assert row.verdict == CANNOT_TELL and row.low < 0.9 and row.high > 1.1
    assert "2.0% is not excluded: compare folders of more runs" in row.reason
    (row,) = compare_within(result(measurement("a", noisy), measurement("b", other)), "a", "b").rows
    assert row.verdict == CANNOT_TELL and "more repetitions" in row.reason


def test_interval_and_test_must_both_see_a_change() -> None:
    old = [1.057, 1.017, 0.973, 0.939, 0.91, 1.001, 0.96, 0.957]
    new = [1.029, 1.037, 0.928, 1.089, 0.94, 1.141, 1.071, 1.016]
    for a, b in ((old, new), (new, old)):
        (row,) = compare_within(result(measurement("a", a), measurement("b", b)), "a", "b").rows
        assert not row.low <= 1 <= row.high and row.p_value > 0.05 and row.verdict == CANNOT_TELL


def test_exit_codes() -> None:
    slower, faster = compare(_run(1.0), _run(1.3)), compare(_run(1.0), _run(0.7))
    assert [slower.exit_code(), slower.exit_code(True), faster.exit_code(True)] == [0, 1, 0]
    assert compare(_run(1.0), _run(1.3, status=INVALID)).exit_code(True) == 3
    assert compare(result(), result()).exit_code() == 3
    unclear = compare(_run(1.0), _run(1.0))
    assert unclear.open and [unclear.exit_code(), unclear.exit_code(True)] == [0, 3]


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (_run(1.0, status=INVALID, reasons=["the host swapped"]), "new measurement is INVALID: the host swapped"),
        (replace(_run(1.0), device={"fingerprint": "0" * 16}), "different devices: cpu_model test and"),
        (
            replace(_run(1.0), device={"fingerprint": "0" * 16, "cpu_model": "test", "onnxruntime": "1.99"}),
            "different devices: onnxruntime \u2013 and 1.99",
        ),
        (
            replace(_run(1.0), device={"fingerprint": "0" * 16, "cpu_model": "test", "emulated": "rpi, 1 cores, 9 MB"}),
            "different devices: emulated \u2013 and rpi, 1 cores, 9 MB",
        ),
        (replace(_run(1.0), device={}), "does not say which device"),
        (result(measurement("m", BASE[:2])), "2 repetitions, 3 are needed"),
        (_run(1.0, provider="cuda"), "provider differs: cpu and cuda"),
    ],
)
def test_not_comparable(new: Result, reason: str) -> None:
    (row,) = compare(_run(1.0), new).rows
    assert row.verdict == NOT_COMPARABLE and reason in row.reason
    assert row.ratio is None and row.speedup is None


def test_a_change_that_so_few_pairs_cannot_show_is_neither_said_nor_denied() -> None:
    slower = measurement("n", [1.3 * t for t in BASE[:3]])
    (row,) = compare_within(result(measurement("m", BASE[:3]), slower), "m", "n").rows
    assert row.verdict == NOT_COMPARABLE and row.ratio == pytest.approx(1.3)
    assert row.reason == "it looks slower, but 3 repetitions cannot tell: measure 6 or more"


def test_other_settings_are_told() -> None:
    old, new = compare(_run(1.0), _run(1.0, n_prompt=64)).rows
    assert old.verdict == new.verdict == NOT_COMPARABLE
    told = "only in the old result, where m was measured with pp8+tg4; the other has pp64+tg4 with 1 thread"
    assert old.reason == told
    assert new.reason.startswith("only in the new result, where m was measured with pp64+tg4")


def test_names_in_one_result_only() -> None:
    old = result(measurement("a", BASE), measurement("b", BASE))
    new = result(measurement("b", BASE), measurement("c", BASE))
    rows = compare(old, new).rows
    assert [(r.name, r.verdict) for r in rows] == [("a", NOT_COMPARABLE), ("b", CANNOT_TELL), ("c", NOT_COMPARABLE)]
    assert (rows[0].reason, rows[2].reason) == ("only in the old result", "only in the new result")


def test_names_that_differ_are_compared_where_the_user_pairs_them(tmp_path: Path) -> None:
    for name, models in (("old", ("a", "b")), ("new", ("c", "d"))):
        kept = result(*(measurement(model, BASE) for model in models))
        write_result(tmp_path / f"{name}.json", kept)
    files = tmp_path / "old.json", tmp_path / "new.json"
    assert here("compare", *files, code=3).stdout.count("only in the") == 4
    pair = here("compare", *files, "--as", "b=c", "--no-confirm").stdout
    assert "c against b" in pair and "only in" not in pair
    assert "nothing was measured as 'x': give one of c, d" in here("compare", *files, "--as", "a=x", code=2).stderr
    assert "write OLD=NEW" in here("compare", *files, "--as", "a", code=2).stderr


def test_one_name_against_another_in_every_setting() -> None:
    old = result(*(measurement("dense", BASE, n_depth=depth) for depth in (0, 64)))
    new = result(*(measurement("slim", [0.8 * t for t in BASE], n_depth=depth) for depth in (64, 0)))
    rows = compare(old, new).rows
    assert [(r.label, r.setting, r.verdict) for r in rows] == [
        ("slim against dense", "pp8+tg4", FASTER),
        ("slim against dense", "pp8+tg4@d64", FASTER),
    ]


def test_prefill_is_judged_where_nothing_is_generated() -> None:
    def prefill(scale: float) -> Result:
        samples = [sample([], i, prefill_s=scale * t) for i, t in enumerate(BASE)]
        return result(measurement("m", [], n_gen=0, samples=samples))

    (row,) = compare(prefill(1.0), prefill(1.2)).rows
    assert (row.verdict, row.what, row.setting) == (SLOWER, "prefill", "pp8")
    unknown = result(measurement("m", [], n_gen=0, samples=[sample([], prefill_s=None)] * 3))
    assert compare(unknown, unknown).rows[0].reason == "neither decode nor prefill was timed"


def test_a_process_is_judged_by_a_low_quantile_in_the_order_measured() -> None:
    burst = measurement("m", [], samples=[sample([1.0, 1.0, 1.0, 9.0], 1), sample([2.0, 2.0, 9.0, 9.0], 0)])
    assert decisive_values(burst) == [[2.0, 1.0]]
    sums = measurement("m", [], samples=[sample([], decode_s=12.0), sample([], decode_s=22.0)])
    assert decisive_values(burst, sums) == [[5.5, 3.0], [3.0, 5.5]]


def test_interleaved_pairs_of_one_run() -> None:
    wild = [0.010, 0.020, 0.013, 0.017, 0.011, 0.019]
    run = result(
        measurement("dense", wild), measurement("dense", wild, n_depth=9), measurement("slim", [0.9 * t for t in wild])
    )
    (row,) = compare_within(run, "dense", "slim").rows
    assert (row.verdict, row.test) == (FASTER, "wilcoxon") and row.high == pytest.approx(0.9)
    with pytest.raises(CompareError, match="no measurement 'none': it has dense, slim"):
        compare_within(run, "none", "slim")


def test_noise_floor_is_the_far_end_of_the_interval() -> None:
    run = result(measurement("m", BASE), measurement("m again", [1.03, 0.99, 1.01, 1.0, 1.02, 0.98] * np.array(BASE)))
    (row,) = compare_within(run, "m", "m again").rows
    assert noise_floor(run, "m", "m again") == max(1 - row.low, row.high - 1)
    assert 0.01 < noise_floor(run, "m", "m again") <= 0.03
    invalid = result(measurement("m", BASE), measurement("m again", BASE, status=INVALID, reasons=["hot"]))
    with pytest.raises(CompareError, match=r"for m again, pp8\+tg4: the new measurement is INVALID: hot"):
        noise_floor(invalid, "m", "m again")
    with pytest.raises(CompareError, match="share no setting"):
        noise_floor(result(measurement("m", BASE), measurement("n", BASE, n_threads=2)), "m", "n")


def test_a_change_stands_only_if_a_second_run_says_it_too() -> None:
    slower, faster, same, refused = (Verdict(v, name="m", ratio=r) for v, r in zip(
        (SLOWER, FASTER, SAME, NOT_COMPARABLE), (1.1, 0.9, 1.01, None), strict=True
    ))  # fmt: skip
    assert confirmed(slower, replace(slower, ratio=1.05)) == replace(slower, ratio=1.05, confirmed=True)
    for other in (same, faster):
        row = confirmed(slower, other)
        assert (row.verdict, row.confirmed, row.ratio) == (SAME, False, other.ratio)
        assert row.reason == "slower: a second run did not confirm it"
    assert confirmed(same, slower) is same
    row = confirmed(slower, Verdict(CANNOT_TELL, reason="too wide"))
    assert (row.verdict, row.reason) == (CANNOT_TELL, "slower, and a second run cannot tell: too wide")
    row = confirmed(slower, replace(refused, reason="INVALID: hot"))
    assert (row.verdict, row.reason) == (NOT_COMPARABLE, "the second run: INVALID: hot")


def test_confirming_a_comparison_leaves_its_other_rows_alone() -> None:
    def of(**verdicts: str) -> Comparison:
        return Comparison(0.02, [Verdict(v, name=k[0], n_threads=int(k[1])) for k, v in verdicts.items()])

    first, second = of(a1=SLOWER, a2=SLOWER, b1=SAME), of(a1=SLOWER, b1=SLOWER, a2=SAME)
    assert [row.verdict for row in confirm(first, second).rows] == [SLOWER, SAME, SAME]
    assert confirm(first, second).exit_code(True) == 1


@pytest.mark.parametrize("effect", [-0.1, 1.0, float("nan")])
def test_smallest_effect_is_a_fraction(effect: float) -> None:
    with pytest.raises(CompareError, match="0 to below 1"):
        compare(_run(1.0), _run(1.0), effect)
