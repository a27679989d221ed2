"""What a person sees is what was said: names of boards and models are no markup."""

from __future__ import annotations

import io

import pytest

from saap.cli import console
from saap.cli import main as cli
from saap.cli.console import Console, print_table

ODD = "ssh://pi@[fe80::1]:22 [/x] [bold]"


def test_brackets_of_a_table_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ODD, ["board [/b]"], [[ODD]])
    assert capsys.readouterr().out.count(ODD) == 2


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
