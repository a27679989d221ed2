"""What a person sees is what was said: names of boards and models are no markup."""

from __future__ import annotations

import io

import pytest

from saap import console
from saap.console import Console, print_table

ODD = "ssh://pi@[fe80::1]:22 [/x] [bold]"


def test_brackets_of_a_table_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ODD, ["board [/b]"], [[ODD]])
    assert capsys.readouterr().out.count(ODD) == 2


def test_brackets_of_a_label_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(console.sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    with Console() as shown:
        shown.report(f"bench, {ODD}", 1, 2)
        shown.report(f"bench, {ODD}", 2, 2)
    assert ODD in screen.getvalue()
