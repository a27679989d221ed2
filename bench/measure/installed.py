"""Which packages this interpreter has: ``python -m bench.measure.installed``, modules as JSON on stdin, one JSON line
out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec


def absent(modules: Sequence[str]) -> list[str]:
    """Those of ``modules`` that cannot be found. They are not imported, which would take seconds."""
    return [name for name in modules if not _found(name)]


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def main() -> None:
    """numpy is what every worker needs."""
    print(json.dumps({"missing": absent(["numpy", *json.load(sys.stdin)["modules"]])}))


if __name__ == "__main__":
    main()
