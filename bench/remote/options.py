"""Options of a board."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from saap.base.errors import UserError
from saap.base.options import Option, refuse_unused


@dataclass(frozen=True)
class BoardOptions:
    """The source of a board's packages; its own package index by default, into a venv of the bench's."""

    wheels: Annotated[Path | None, Option("With --on: a folder of wheels for a board that reaches no index.")] = None
    board_packages: Annotated[bool, Option("With --on: use what the board's Python has, make no venv.")] = False

    def check(self, on_a_board: bool = True) -> None:
        """Refuse what contradicts itself. Raises UserError: naming the options."""
        if not on_a_board:
            refuse_unused(self, ("wheels", "board_packages"), "--on", "name a board")
        if self.wheels is not None and self.board_packages:
            raise UserError("--wheels fills a venv there, --board-packages makes none: give one of them")
