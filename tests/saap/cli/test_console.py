"""What a person sees is what was said: names of boards and models are no markup."""

import contextlib
import io
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from saap.cli import console
from saap.cli import main as cli
from saap.cli.console import Console, plan_chart, print_table, tell

ODD = "ssh://pi@[fe80::1]:22 [/x] [bold]"


def test_brackets_of_a_table_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ODD, ["board [/b]"], [[ODD]])
    assert capsys.readouterr().out.count(ODD) == 2


def test_a_plan_shows_what_is_left_of_each_kind_of_block() -> None:
    chart = plan_chart(
        [
            {"query_heads": 4, "kv_heads": 2, "ffn": 8},
            {"query_heads": 0, "kv_heads": 0, "ffn": 8, "conv": 64},
            {"query_heads": 0, "kv_heads": 0, "ffn": 8, "delta": 16},
        ],
        [
            {"query_heads": [0, 1], "kv_heads": [0], "ffn": [0, 2]},
            {"query_heads": [], "kv_heads": [], "ffn": list(range(8)), "conv": [1, 2, 3]},
            {"query_heads": [], "kv_heads": [], "ffn": [], "delta": [0]},
        ],
    ).splitlines()
    assert [line.split()[:3] for line in chart[1:]] == [
        ["0", "2/4", "1/2"],
        ["1", "3/64", "conv"],
        ["2", "1/16", "delta"],
    ]
    assert [line.count("█") for line in chart[1:]] == [6, 24, 0] and chart[1].endswith(" 2")
    assert len({line.find("█") for line in chart[1:3]}) == 1  # bars begin in one column


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_table_is_never_wider_than_the_screen_and_breaks_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    heads = ["name", "threads", "decode tok/s", "decode IQR", "first token ms", "peak load MB", "status"]
    row = ["dense-int4", "1", "12345.6", "12345.1-12346.2", "1234567.8", "12345678.9", "WARN"]
    print_table("medians", heads, [row] * 2, ("peak load MB", "decode IQR", "first token ms"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert out.count("12345.6") == 2 and out.count("dense-int4") == 2 and "WARN" in out
    assert ("1234567.8" in out) == (columns >= 60) and ("12345678.9" in out) == (columns == 100)
    assert ("not shown at" in out) == (columns < 100)


@pytest.mark.parametrize("steering", ["\x1b[2J", "\x07", "\x9b31m", "\u202e", "\r", "\x1b]0;title\x07"])
def test_what_would_steer_a_terminal_is_not_printed(capsys: pytest.CaptureFixture[str], steering: str) -> None:
    print_table(f"a{steering}b", ["name"], [[f"c{steering}d"]])
    with Console() as told:
        told.say(f"e{steering}f")
    with pytest.raises(SystemExit):
        cli.fail(f"g{steering}h", 2)
    out, err = capsys.readouterr()
    assert steering not in out + err and "\x1b" not in out + err
    assert all(part in out + err for part in ("a?", "c?", "e?", "g?") if steering != "\r")


def test_brackets_of_a_label_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(console.sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    with Console() as shown:
        shown.report(f"bench, {ODD}", 1, 2)
        shown.report(f"bench, {ODD}", 2, 2)
    assert ODD in screen.getvalue()


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What was drawn, one line after the other."""
        return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())) if line]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> Screen:
    screen = Screen()
    monkeypatch.setattr(console.sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    return screen


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_bar_says_how_much_is_left_and_in_which_unit_and_fits_the_screen(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    screen = at_a_terminal(monkeypatch, columns)
    label = "tuning (steps), NLL+KL 3.123, held-out NLL 6.123, 12345 tokens/s"
    with Console() as told:
        told.report(label, 0, 12)
        clock(20)
        told.report(label, 4, 12)
    assert max(map(len, screen.lines())) <= columns
    assert screen.lines()[-1].startswith("  tuning, NLL")
    assert "4/12 steps" in screen.lines()[-1] and "0:00:40 left" in screen.lines()[-1]


def test_a_bar_that_is_full_does_not_stand_there_while_work_goes_on(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = at_a_terminal(monkeypatch)
    with Console() as told:
        told.report("bench (runs)", 1, 2)
        clock(2)
        told.report("bench (runs)", 2, 2)
        assert told._bars is None and "2/2 runs" in screen.lines()[-1] and "left" not in screen.lines()[-1]
        told.report("measuring memory bandwidth (probes)", 0, 1)
        assert told._bars is not None
    assert "0/1 probes" in screen.lines()[-1]


def test_what_takes_longer_than_foreseen_is_not_said_to_be_over(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = at_a_terminal(monkeypatch)
    with Console() as told:
        told.report("evaluating (chunks)", 0, 2)
        clock(3)
        told.report("evaluating (chunks)", 1, 2)
        told._bars.refresh()
        assert "0:00:03 left" in screen.lines()[-1]
        clock(9)
    assert "1/2 chunks" in screen.lines()[-1] and "left" not in screen.lines()[-1]


def test_a_wait_of_unknown_length_is_named_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = at_a_terminal(monkeypatch)
    with Console() as told:
        told.report("loading PyTorch and the model", 0, 0)
        told.report("converting (tensors), a.gguf", 0, 0)
        told.report("converting (tensors), a.gguf", 0, 3)
        told.report("converting (tensors), a.gguf", 3, 3)
    shown = "\n".join(screen.lines())
    assert "loading PyTorch and the model" in shown and "3/3 tensors" in screen.lines()[-1]


def test_without_a_terminal_progress_is_lines_with_a_unit(
    capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    with Console() as told:
        told.report("loading", 0, 0)
        told.report("scoring (sequences), stage 1 of 2", 0, 8)
        clock(30)
        told.report("scoring (sequences), stage 1 of 2", 4, 8)
        told.report("scoring (sequences), stage 1 of 2", 8, 8)
        told.report("scoring (sequences), stage 1 of 2", 8, 8)
    assert capsys.readouterr().err.splitlines() == [
        "  scoring, stage 1 of 2: 0/8 sequences, 0 s",
        "  scoring, stage 1 of 2: 4/8 sequences, 30 s, 30 s left",
        "  scoring, stage 1 of 2: 8/8 sequences, 30 s",
    ]


def test_progress_is_shown_while_a_library_is_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = at_a_terminal(monkeypatch)
    with Console() as told:
        told.report("converting (tensors), a.gguf", 0, 0)
        with contextlib.redirect_stderr(io.StringIO()):
            told.report("converting (tensors), a.gguf", 3, 3)
    assert "3/3 tensors" in screen.lines()[-1]


@pytest.mark.parametrize("columns", [60, 100])
def test_no_sentence_is_longer_than_the_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    tell("out/dense\n  " + "a parity that took many words " * 6)
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= columns and out[0] == "out/dense" and out[1].startswith("  a parity")
    assert all(line.startswith("    ") for line in out[2:]) and len(out) > 2


def test_a_sentence_is_one_line_for_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    tell("word " * 60)
    assert len(capsys.readouterr().out.splitlines()) == 1
