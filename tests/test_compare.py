from __future__ import annotations

from dataclasses import replace

import pytest

from bench.compare import FASTER, NOT_COMPARABLE, SAME, SLOWER, CompareError, compare, compare_within
from bench.result import INVALID
from tests.bench_samples import measurement, result

BASE = [0.0100, 0.0101, 0.0099, 0.0102, 0.0100]


def _run(scale: float, **fields: object):
    return result(measurement("m", [scale * t for t in BASE], **fields))


@pytest.mark.parametrize(
    ("scale", "min_effect", "verdict"),
    [(0.8, 0.02, FASTER), (1.25, 0.02, SLOWER), (1.0, 0.02, SAME), (1.04, 0.02, SLOWER), (1.04, 0.1, SAME)],
)
def test_verdicts(scale: float, min_effect: float, verdict: str) -> None:
    (row,) = compare(_run(1.0), _run(scale), min_effect).rows
    assert row.verdict == verdict
    assert row.ratio == pytest.approx(scale) and row.speedup == pytest.approx(1 / scale)
    assert row.low <= row.ratio <= row.high


def test_noise_wider_than_the_difference_is_the_same() -> None:
    noisy = result(measurement("m", [0.008, 0.014, 0.010, 0.009, 0.013]))
    (row,) = compare(noisy, result(measurement("m", [0.009, 0.015, 0.011, 0.008, 0.013]))).rows
    assert row.verdict == SAME and row.low < 1 < row.high


def test_exit_codes() -> None:
    slower, faster = compare(_run(1.0), _run(1.3)), compare(_run(1.0), _run(0.7))
    assert [slower.exit_code(), slower.exit_code(True), faster.exit_code(True)] == [0, 1, 0]
    assert compare(_run(1.0), _run(1.3, status=INVALID)).exit_code(True) == 3
    assert compare(result(), result()).exit_code() == 3


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (_run(1.0, status=INVALID, reasons=["the host swapped"]), "new measurement is INVALID: the host swapped"),
        (replace(_run(1.0), device={"fingerprint": "0" * 16}), "different devices"),
        (replace(_run(1.0), device={}), "does not say which device"),
        (result(measurement("m", BASE[:2])), "2 repetitions, 3 are needed"),
        (_run(1.0, n_prompt=64), "n_prompt differs: 8 and 64"),
    ],
)
def test_not_comparable(new: object, reason: str) -> None:
    (row,) = compare(_run(1.0), new).rows
    assert row.verdict == NOT_COMPARABLE and reason in row.reason
    assert row.ratio is None and row.speedup is None


def test_names_in_one_result_only() -> None:
    old = result(measurement("a", BASE), measurement("b", BASE))
    new = result(measurement("b", BASE), measurement("c", BASE))
    rows = compare(old, new).rows
    assert [(r.name, r.verdict) for r in rows] == [("a", NOT_COMPARABLE), ("b", SAME), ("c", NOT_COMPARABLE)]
    assert (rows[0].reason, rows[2].reason) == ("only in the old result", "only in the new result")


def test_interleaved_pairs_of_one_run() -> None:
    wild = [0.010, 0.020, 0.013, 0.017, 0.011]
    run = result(measurement("dense", wild), measurement("slim", [0.9 * t for t in wild]))
    (row,) = compare_within(run, "dense", "slim").rows
    assert row.verdict == FASTER and row.high == pytest.approx(0.9)
    with pytest.raises(CompareError, match="no measurement 'none': it has dense, slim"):
        compare_within(run, "none", "slim")


@pytest.mark.parametrize("effect", [-0.1, 1.0, float("nan")])
def test_smallest_effect_is_a_fraction(effect: float) -> None:
    with pytest.raises(CompareError, match="0 to below 1"):
        compare(_run(1.0), _run(1.0), effect)
