"""What do the checks of this checkout cost, against the one before them?

    python -m studies.checks.study run BASE BUNDLE MODEL --pairs 20     # a cell for each command, into cells/
    python -m studies.checks.study table --write

BASE is a checkout of the commit before the checks, with an environment of its own in BASE/.venv (or --base-python),
of the same packages as this one. Nothing else should run: the commands take their turns, but a clock that moves moves
them by more than the checks do.
"""

from __future__ import annotations

import json
import shutil
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
BAR = 1.03
OUT = "out"  # what the export writes, below the folder in which commands run
COMMANDS = {
    "help": "saap --help",
    "generate": 'saap generate BUNDLE "a" --raw --max-tokens 1 --threads 1',
    "export": "saap export MODEL -o OUT --parity none",
}
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
        """Seconds of the processors in user mode that a command of saap and its children take.

        What the system takes is left out: moving a model to huge pages costs it 0.05 to 0.5 s, run by run.
        """
        env = {"SAAP_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        return used_by_saap(self.checkout, self.python, words, place, env).ru_utime

    def about(self) -> dict[str, str | None]:
        """Its commit, and the versions of its packages; saap's is what the commit is."""
        asked = [self.python, "-c", ABOUT, *PACKAGES[1:]]
        versions = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
        return {"commit": commit_of(self.checkout), **versions}


# The export of before knew one way of choosing integers, and had no word for it.
NOW = {"export": ["--integers", "nearest"]}


def words_of(command: str, bundle: Path, model: str) -> tuple[list[str], list[str]]:
    """What stands after ``saap`` in the checkout of before, and in this one."""
    words = {
        "help": ["--help"],
        "generate": ["generate", str(bundle), "a", "--raw", "--max-tokens", "1", "--threads", "1"],
        "export": ["export", model, "-o", OUT, "--parity", "none"],
    }[command]
    return words, [*words, *NOW.get(command, [])]


def pairs_of(words: Sequence[Sequence[str]], sides: Sequence[Side], count: int, place: Path) -> list[list[float]]:
    """CPU seconds of both sides, pair by pair, each first in every second one; a first run of each is not counted."""
    found = []
    for number in range(-1, count):
        pair = [0.0, 0.0]
        for index in (0, 1) if number % 2 else (1, 0):
            pair[index] = sides[index].cpu_s(words[index], place)
            shutil.rmtree(place / OUT, ignore_errors=True)
        if number >= 0:
            found.append(pair)
    return found


def table(cells: Sequence[Cell]) -> str:
    """A row for each command and machine, over the pairs of all its cells."""
    rows = []
    for key in dict.fromkeys((cell["what"], cell["machine"]) for cell in cells):
        some = [cell for cell in cells if (cell["what"], cell["machine"]) == key]
        base, now = zip(*(pair for cell in some for pair in cell["pairs"]), strict=True)
        ratio, low, high = bootstrap_ratio(base, now, paired=True)
        shown = "reached" if high <= BAR else "**not reached**" if low > BAR else "cannot be told"
        rows.append([
            f"`{COMMANDS[key[0]]}`", len(base), f"{median(base):.2f} s", f"{median(now):.2f} s", f"{ratio:.3f}",
            f"{low:.3f} to {high:.3f}", shown, ", ".join(sorted({_differ(cell) for cell in some})),
            cpu_of(key[1]),
        ])  # fmt: skip
    return markdown(
        ["command", "pairs", "CPU time before", "now", "ratio", "95 % interval", f"at most {BAR}", "packages",
         "machine"], rows
    )  # fmt: skip


def _differ(cell: Cell) -> str:
    """Which packages of the two environments are not of one version."""
    base, now = cell["base"], cell["now"]
    names = sorted(name for name in {*base, *now} - {"commit"} if base.get(name) != now.get(name))
    return ", ".join(f"{name} {base.get(name)} and {now.get(name)}" for name in names) or "the same"


def tables() -> dict[str, str]:
    """The tables of README.md."""
    return {"checks": table(read_cells(FOLDER / "cells"))}


def run(sides: Sequence[Side], words: dict[str, tuple[list[str], list[str]]], count: int, cells: Path) -> None:
    """A cell for each command."""
    about = dict(zip(("base", "now"), (side.about() for side in sides), strict=True))
    cells.mkdir(exist_ok=True)
    for what, given in words.items():
        with tempfile.TemporaryDirectory(prefix="saap-checks-") as place:
            pairs = pairs_of(given, sides, count, Path(place))
        cell = {**provenance(), "what": what, **about, "pairs": pairs}
        name = f"{what}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        (cells / name).write_text(json.dumps(cell) + "\n", encoding="utf-8")
        print(table([cell]).splitlines()[-1], flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("do", choices=["run", "table"])
    parser.add_argument("base", nargs="?", type=Path, help="the checkout from before the checks")
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("model", nargs="?", help="a model directory or a name")
    parser.add_argument("--base-python", type=Path, help="default: BASE/.venv/bin/python")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--only", choices=list(COMMANDS), action="append", help="may be repeated; default: all")
    parser.add_argument("--cells", type=Path, default=FOLDER / "cells", help="the folder of what is measured")
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.do == "table":
        return show_tables(FOLDER, tables(), given.write)
    if given.model is None:
        parser.error("run needs BASE, BUNDLE and MODEL")
    model = str(Path(given.model).resolve()) if Path(given.model).exists() else given.model
    words = {what: words_of(what, given.bundle.resolve(), model) for what in given.only or COMMANDS}
    python = given.base_python or given.base / ".venv" / "bin" / "python"
    with tempfile.TemporaryDirectory(prefix="saap-checks-cache-") as home:
        sides = [
            Side(given.base.resolve(), python.absolute(), Path(home) / "base"),
            Side(ROOT, Path(sys.executable), Path(home) / "now"),
        ]
        run(sides, words, given.pairs, given.cells)


if __name__ == "__main__":
    main()
