"""Pythons that have a package: another runtime may be installed beside ours, in an environment of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import cast

from saap.base.child import ChildFailedError, absent, call
from saap.base.errors import UserError

PEER_PYTHON = "SAAP_PEER_PYTHON"


def python_with(modules: Sequence[str], what: str, install: str) -> str:
    """Return the interpreter that has ``modules``: the one that ``SAAP_PEER_PYTHON`` names, else our own.

    Raises:
        UserError: neither has them; ``what`` needs them, ``install`` is what to give to pip.
    """
    chosen = os.environ.get(PEER_PYTHON)
    lacking = missing_in(chosen, modules) if chosen else []
    if chosen and not lacking:
        return chosen
    missing = absent(modules)
    if not missing:
        return sys.executable
    there = lacking[0] if chosen else missing[0]
    elsewhere = f" in {chosen}, nor {missing[0]} here" if chosen else ""
    raise UserError(
        f"{what} needs {there}, which is not installed{elsewhere}: pip install {install}, "
        f"or name a Python that has it in {PEER_PYTHON}"
    )


def missing_in(python: str, modules: Sequence[str]) -> list[str]:
    """Return those of ``modules`` that another interpreter lacks; none is imported.

    Raises:
        UserError: it is no Python that can run our workers.
    """
    try:
        return cast("list[str]", call("saap.base.child", {"modules": list(modules)}, 60, python=python)["missing"])
    except (OSError, ChildFailedError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{PEER_PYTHON}={python} does not run ({reason}): "
            "give the path of a Python 3.10 or newer with numpy and msgspec"
        ) from None
