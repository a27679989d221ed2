"""Idle threads of PyTorch sleep after a moment, unless the user chose otherwise.

GNU's OpenMP lets them spin. Where anything else runs on the machine, a thread that spins holds the core that the one it
waits for needs: with one other busy process on two cores, rounding a matrix to integers took 3.8 s instead of 0.2 s.
Threads that sleep at once make it 0.1 s on an idle machine, where those that spin for a moment take 0.03 s.
"""

from __future__ import annotations

import os

_VARIABLE, _OTHER, _SPINS = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "3000"
_ours = False


def sleep_while_waiting() -> None:
    """Let idle threads of this process sleep; it must not have loaded PyTorch yet."""
    global _ours
    if _VARIABLE not in os.environ and _OTHER not in os.environ:
        os.environ[_VARIABLE], _ours = _SPINS, True


def environment_of_others() -> dict[str, str]:
    """Return the environment of a measured process, whose threads wait as its runtime's authors chose."""
    return {name: value for name, value in os.environ.items() if not (_ours and name == _VARIABLE)}
