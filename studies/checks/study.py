"""The time that the checks of a bundle add to a first token, against a build whose checks return at once.

    python -m studies.checks.study run BASE BUNDLE --pairs 40     # a cell, into cells/
    python -m studies.checks.study table --write

BASE is a checkout of this commit in which the checks return at once, with an environment of its own in BASE/.venv (or
--base-python), of the same packages as this one. Nothing else should run: the commands take turns, but a clock that
moves moves them by more than the checks do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.measure.statistics import bootstrap_ratio
from studies.common import (
    PACKAGES,
    ROOT,
    Cell,
    add_write_option,
    commit_of,
    cpu_of,
    markdown,
    parser_of,
    provenance,
    read_cells,
    show_tables,
    used_by_saap,
)

FOLDER = Path(__file__).parent
BAR = 1.05  # of the upper bound of the interval
COMMAND = ["generate", "BUNDLE", "Why is the sky blue?", "--max-tokens", "1", "--threads", "1"]
ABOUT = (  # what a checkout and its environment are, as its own Python says
    "import json, platform, sys\n"
    "from importlib.metadata import PackageNotFoundError, version\n"
    "found = {'python': platform.python_version()}\n"
    "for name in sys.argv[1:]:\n"
    "    try:\n"
    "        found[name] = version(name)\n"
    "    except PackageNotFoundError:\n"
    "        pass\n"
    "print(json.dumps(found))"
)


@dataclass(frozen=True)
class Side:
    """A checkout, the Python that runs it, and a cache of its own."""

    checkout: Path
    python: Path
    cache: Path

    def cpu_s(self, words: Sequence[str], place: Path) -> float:
        """Measure the seconds in user mode that a command of saap and its children take.

        The system's share is left out: moving a model to huge pages costs it 0.05 to 0.5 s, run by run.
        """
        env = {"SAAP_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        return used_by_saap(self.checkout, self.python, words, place, env).ru_utime

    def about(self) -> dict[str, str | None]:
        """Return its commit and the versions of its packages; saap's is the commit."""
        command = [self.python, "-c", ABOUT, *PACKAGES[1:]]
        versions = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return {"commit": commit_of(self.checkout), **versions}


def pairs_of(words: Sequence[str], sides: Sequence[Side], count: int, place: Path) -> list[list[float]]:
    """Measure CPU seconds of both sides, each first in every second pair; a first run of each does not count."""
    pairs = []
    for number in range(-1, count):
        pair = [0.0, 0.0]
        for index in (0, 1) if number % 2 else (1, 0):
            pair[index] = sides[index].cpu_s(words, place)
        if number >= 0:
            pairs.append(pair)
    return pairs


def table(cells: Sequence[Cell]) -> str:
    """A row for each machine, over the pairs of all its cells."""
    rows = []
    for machine in dict.fromkeys(cell["machine"] for cell in cells):
        some = [cell for cell in cells if cell["machine"] == machine]
        base, now = zip(*(pair for cell in some for pair in cell["pairs"]), strict=True)
        ratio, low, high = bootstrap_ratio(base, now, paired=True)
        shown = "reached" if high <= BAR else "**not reached**" if low > BAR else "cannot be told"
        rows.append([
            len(base), f"{median(base):.2f} s", f"{median(now):.2f} s", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}",
            shown, ", ".join(sorted({_differ(cell) for cell in some})), cpu_of(machine),
        ])  # fmt: skip
    return markdown(
        ["pairs", "CPU time, unchecked", "checked", "ratio", "95 % interval", f"at most {BAR}", "packages", "machine"],
        rows,
    )


def _differ(cell: Cell) -> str:
    """List the packages whose versions differ between the environments."""
    base, now = cell["base"], cell["now"]
    names = sorted(name for name in {*base, *now} - {"commit"} if base.get(name) != now.get(name))
    return ", ".join(f"{name} {base.get(name)} and {now.get(name)}" for name in names) or "the same"


def tables() -> dict[str, str]:
    """The tables of README.md."""
    return {"checks": table(read_cells(FOLDER / "cells"))}


def run(sides: Sequence[Side], bundle: Path, count: int, cells: Path) -> None:
    """Measure and write a cell."""
    base, now = (side.about() for side in sides)
    cells.mkdir(exist_ok=True)
    words = [str(bundle) if word == "BUNDLE" else word for word in COMMAND]
    with tempfile.TemporaryDirectory(prefix="saap-checks-") as place:
        pairs = pairs_of(words, sides, count, Path(place))
    cell = {**provenance(), "base": base, "now": now, "pairs": pairs}
    (cells / f"{time.strftime('%Y%m%d-%H%M%S')}.json").write_text(json.dumps(cell) + "\n", encoding="utf-8")
    print(table([cell]).splitlines()[-1], flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("do", choices=["run", "table"])
    parser.add_argument("base", nargs="?", type=Path, help="a checkout whose checks return at once")
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--base-python", type=Path, help="default: BASE/.venv/bin/python")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--cells", type=Path, default=FOLDER / "cells", help="the folder for the cell")
    add_write_option(parser)
    args = parser.parse_args(arguments)
    if args.do == "table":
        return show_tables(FOLDER, tables(), args.write)
    if args.bundle is None:
        parser.error("run needs BASE and BUNDLE")
    python = args.base_python or args.base / ".venv" / "bin" / "python"
    with tempfile.TemporaryDirectory(prefix="saap-checks-cache-") as home:
        sides = [
            Side(args.base.resolve(), python.absolute(), Path(home) / "base"),
            Side(ROOT, Path(sys.executable), Path(home) / "now"),
        ]
        run(sides, args.bundle.resolve(), args.pairs, args.cells)


if __name__ == "__main__":
    main()
