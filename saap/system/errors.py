"""Errors that are the user's to mend.

Every error class of the project that is meant for a person carries ``exit_code``; the command line prints its
one line and leaves with that code, and lets anything else through as the defect it is.
"""

from __future__ import annotations


class SaapError(ValueError):
    """What happened, what is allowed, what to do: one line."""

    exit_code = 2
