from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timedelta, timezone

from bench.report.history import Point, Series
from bench.report.history_plot import changes_text, history_panels, history_plot

START = datetime(2025, 1, 1, 12, tzinfo=timezone.utc)


def history(medians: list[float]) -> Series:
    points = [
        Point((START + timedelta(days=i)).isoformat(), f"{i}.json", m, 0.99 * m, 1.01 * m, 5, "OK")
        for i, m in enumerate(medians)
    ]
    return Series("f" * 16, "Some Board", "dense $x$", 8, 4, 0, 2, "pp8+tg4", "decode", points)


def test_a_change_is_marked_and_told() -> None:
    found = history([0.0100, 0.0101] * 10 + [0.0110, 0.0111] * 10)
    (panel,) = history_panels([found])
    assert panel["changes"] == ["10.0 % slower from 2025-01-21 12:00 on (20.json)"]
    assert (panel["title"], panel["runs"]) == ("dense $x$, pp8+tg4", 40)
    assert changes_text(found, []) == []
    dashed, plain = history_plot(found, [20], "a"), history_plot(found, [], "a")
    assert [drawing.count("stroke-dasharray") for drawing in (dashed, plain)] == [1, 0]
    words = "".join(ElementTree.fromstring(dashed).itertext())
    assert "ms per token" in words and "2025-01-" in words
    assert not set(re.findall(r"#[0-9a-f]{6}\b", dashed)) - {"#000000", "#ffffff"}


def test_long_histories_stay_small_and_single_runs_are_drawn() -> None:
    assert len(history_plot(history([0.01, 0.011] * 1000), [], "a")) < 60_000
    assert "<svg" in history_plot(history([0.01]), [], "b")
