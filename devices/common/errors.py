"""Errors that a person can mend. Standard library only."""

from __future__ import annotations


class UserError(ValueError):
    """What happened, what is allowed, what to do: one line.

    The command line prints the line and leaves with ``exit_code``; any other exception is a defect and is shown as one.
    """

    exit_code = 2
