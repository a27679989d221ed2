"""Errors that a person can mend. Standard library only."""

from __future__ import annotations


class UserError(ValueError):
    """One line: what happened, what is allowed, what to do.

    The command line prints the line and leaves with ``exit_code``; any other exception is a defect and is shown as one.
    """

    exit_code = 2


def first_line(error: Exception) -> str:
    """Return a library's message without the lines that say where."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
