from __future__ import annotations

from pathlib import Path

import pytest

from bench.measure.cores import CoolDown


class Board:
    """Two degrees cooler with every look, and a clock that the waits move."""

    def __init__(self, root: Path) -> None:
        self.zone, self.now = root / "sys/class/thermal/thermal_zone0", 0.0
        self.zone.mkdir(parents=True)
        (self.zone / "type").write_text("cpu-thermal\n")

    def set(self, celsius: float) -> None:
        (self.zone / "temp").write_text(f"{int(celsius * 1000)}\n")

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.set(int((self.zone / "temp").read_text()) / 1000 - 2)


def test_it_waits_until_the_start_is_near(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.set(40)
    cool = CoolDown(60, tmp_path, lambda: board.now, board.sleep)
    assert cool.wait() == 0
    board.set(52)
    assert cool.wait() == pytest.approx(2.5)  # 52, 50, 48, 46, 44, 42
    board.set(43)
    assert cool.wait() == 0


def test_it_does_not_wait_for_ever(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.set(40)
    cool = CoolDown(2, tmp_path, lambda: board.now, board.sleep)
    board.set(90)
    assert cool.wait() == pytest.approx(2)


@pytest.mark.parametrize("limit_s", [0, 60])
def test_it_does_not_wait_where_it_was_not_asked_or_nothing_is_told(tmp_path: Path, limit_s: float) -> None:
    def never(seconds: float) -> None:
        raise AssertionError("it waited")

    if limit_s == 0:
        Board(tmp_path).set(90)
    assert CoolDown(limit_s, tmp_path, sleep=never).wait() < 0.1
