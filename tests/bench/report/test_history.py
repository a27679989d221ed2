from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bench_samples import measurement, result

from bench.measure.result import INVALID, Result, ResultError, read_result
from bench.report.history import (
    LEAST_SEGMENT,
    Point,
    Series,
    add,
    best_cuts,
    change_points,
    series,
)


def run(day: int, seconds: float = 0.02, **fields: Any) -> Result:
    created = f"2025-01-{day:02d}T12:00:00+00:00"
    return result(measurement("dense", [seconds, 1.1 * seconds, 0.9 * seconds]), **{"created": created, **fields})


def points(folder: Path) -> list[tuple[str, float]]:
    (found,) = series(folder)
    return [(point.created[:10], round(point.median_s, 6)) for point in found.points]


def test_results_are_kept_under_their_time_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "history"
    path = add(folder, run(2))
    assert path.name.startswith("20250102T120000Z-") and read_result(path) == run(2)
    assert add(folder, run(2)) == path
    assert add(folder, run(2, 0.03)) != path
    assert [p.suffix for p in folder.iterdir()] == [".json", ".json"]
    with pytest.raises(ResultError, match="'yesterday', which is no ISO 8601 time"):
        add(folder, run(1, created="yesterday"))


def test_series_are_in_the_order_of_time_per_device_and_setting(tmp_path: Path) -> None:
    for day, seconds in ((3, 0.03), (1, 0.01), (2, 0.02)):
        add(tmp_path, run(day, seconds))
    assert points(tmp_path) == [("2025-01-01", 0.01), ("2025-01-02", 0.02), ("2025-01-03", 0.03)]
    add(tmp_path, run(4, device={"fingerprint": "0" * 16, "board": "Some Board"}))
    other, first = series(tmp_path)
    assert (other.device, other.fingerprint, len(other.points)) == ("Some Board", "0" * 16, 1)
    assert (first.name, first.setting, first.metric, first.n_threads) == ("dense", "pp8+tg4", "decode", 1)


def test_what_cannot_be_believed_or_placed_is_left_out(tmp_path: Path) -> None:
    add(tmp_path, run(1))
    add(tmp_path, result(measurement("dense", [1.0] * 3, status=INVALID, reasons=["hot"])))
    add(tmp_path, result(measurement("dense", [1.0] * 3), fingerprint=None))
    assert points(tmp_path) == [("2025-01-01", 0.02)]


def test_a_folder_may_be_edited_by_hand_and_hold_the_index_of_an_older_version(tmp_path: Path) -> None:
    first = add(tmp_path, run(1))
    add(tmp_path, run(2))
    (tmp_path / "history-index.jsonl").write_text('{"crc32": "00000000", "file": "half')
    (tmp_path / "by hand.json").write_text(add(tmp_path / "elsewhere", run(3)).read_text())
    first.unlink()
    told: list[tuple[int, int]] = []
    (found,) = series(tmp_path, lambda what, done, total: told.append((done, total)))
    assert [point.created[:10] for point in found.points] == ["2025-01-02", "2025-01-03"]
    assert told == [(1, 2), (2, 2)]


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no folder"):
        series(tmp_path / "none")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ResultError, match=r"bad\.json is damaged"):
        series(tmp_path)


def test_a_step_of_five_percent_in_noise_of_two() -> None:
    found = 0
    for seed in range(50):
        values = np.random.default_rng(seed).lognormal(np.log(0.02), 0.02, 40)
        values[20:] *= 1.05
        changes = change_points(values)
        found += len(changes) == 1 and abs(changes[0] - 20) <= 2
    assert found >= 45


@pytest.mark.parametrize("spikes", [0.0, 0.1])
def test_no_step_in_noise_with_or_without_outliers(spikes: float) -> None:
    alarms = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        values = random.lognormal(0, 0.02, 40) * np.where(random.random(40) < spikes, 1.25, 1)
        alarms += bool(change_points(values))
    assert alarms <= 10


@pytest.mark.parametrize("penalty", [0.5, 4.0, 20.0])
def test_no_cuts_are_better_than_the_best(penalty: float) -> None:
    """Against every way to cut series of 16."""
    places = range(LEAST_SEGMENT, 16 - LEAST_SEGMENT + 1)
    ways = [[], *([a] for a in places), *([a, b] for a in places for b in places if b - a >= LEAST_SEGMENT)]
    several = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        values = random.normal(0, 1, 16) + 3 * (np.arange(16) >= random.integers(16))

        def loss(cuts: list[int], values: np.ndarray = values) -> float:
            return sum(float(((level - level.mean()) ** 2).sum()) + penalty for level in np.split(values, cuts))

        found = best_cuts(values, penalty)
        assert found == min(ways, key=loss)
        several += len(found) > 0
    assert several > 5


def test_exact_steps_and_short_series() -> None:
    assert change_points([1.0] * 10 + [2.0] * 10 + [1.0] * 10) == [10, 20]
    assert change_points([1.0] * 30) == []
    assert change_points([1.0] * 4 + [9.0] * 5) == []
    assert change_points([]) == []


START = datetime(2025, 1, 1, 12, tzinfo=timezone.utc)


def history(medians: list[float]) -> Series:
    points = [
        Point((START + timedelta(days=day)).isoformat(), f"{day}.json", median) for day, median in enumerate(medians)
    ]
    return Series("f" * 16, "Some Board", "dense", "pp8+tg4", 2, "decode", points)


def test_a_change_of_the_level_is_named() -> None:
    changed, steady = history([0.0100, 0.0101] * 10 + [0.0110, 0.0111] * 10), history([0.01] * 40)
    assert changed.changes == ["10.0 % slower from 21 January 2025, 12:00 UTC on (20.json)"]
    assert steady.changes == []
