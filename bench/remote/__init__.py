"""Measuring on a board: the bench sends itself there, runs detached, and brings the result back.

``Target`` is this host or a board behind one interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from bench.remote.options import BoardOptions as BoardOptions
    from bench.remote.target import Target as Target

__all__ = ["BoardOptions", "Target"]
__getattr__ = handed_out(__name__, {"BoardOptions": ".options", "Target": ".target"})
