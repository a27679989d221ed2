"""Does halving find the plan that is best after full tuning? Every plan of a trial, tuned in full, by its KL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from saap.models.record import read_record
from studies.common import Bar, Cell, markdown, provenance, saap

WINDOWS, LENGTH = 100, 256
BEST = 2  # the chosen plan is to be among so many


def trial(model: str, command: list[str], text: Path, tokens: int, work: Path, in_full: int) -> Cell:
    """Let `saap prune --effort thorough` choose, and tune what it tried, by commands that anyone can type.

    ``in_full``: how many plans are tuned in full, the best after the first round.
    """
    chosen = work / "chosen"

    def unless(path: Path, *words: object) -> None:
        if not path.exists():
            saap(*words)

    unless(chosen, "prune", model, *command, "-o", chosen, "--effort", "thorough")
    tried = read_record(chosen)["plan"]["trials"]
    for entry in sorted(tried, key=lambda entry: next(iter(entry["kl"].values())))[:in_full]:
        plan, tuned = (work / f"plan{entry['plan']}{kind}" for kind in ("", "-tuned"))
        judged = work / f"{plan.name}.json"
        if not judged.exists():
            settings = [f"{name}={value}" for name, value in entry["settings"].items() if value is not None]
            unless(plan, "prune", model, *command, "-o", plan, *(word for each in settings for word in ("--set", each)))
            price = read_record(plan)["plan"]["price_nats"]
            if abs(price - entry["price_nats"]) > 1e-6:
                raise SystemExit(f"plan {entry['plan']} has the price {price}, in the trial {entry['price_nats']}")
            unless(tuned, "tune", plan, "-o", tuned, "--teacher", model, "--tokens", tokens)
            cut = ["--text", text, "--chunk", LENGTH, "--max-chunks", WINDOWS]
            saap("eval", tuned, "--reference", model, *cut, "--json", judged)
            shutil.rmtree(tuned)
        entry["tuned"] = json.loads(judged.read_text())["rows"][-1]["kl"]
    return {"asked": [word for word in command if not word.startswith("/")], "tokens": tokens, "tried": tried,
            **provenance()}  # fmt: skip


def chosen_of(cell: Cell) -> Cell:
    """The plan that halving chose: the best of those that were tuned most."""
    most = max(len(plan["kl"]) for plan in cell["tried"])
    return dict(min((t for t in cell["tried"] if len(t["kl"]) == most), key=lambda plan: list(plan["kl"].values())[-1]))


def place_of(cell: Cell) -> int:
    """Return the place of the chosen plan after full tuning; 1 is the best."""
    return 1 + sum(plan["tuned"] < chosen_of(cell)["tuned"] for plan in tuned_in_full(cell))


def tuned_in_full(cell: Cell) -> list[Cell]:
    """The plans of a trial that were tuned in full, the best first."""
    return sorted((plan for plan in cell["tried"] if "tuned" in plan), key=lambda plan: plan["tuned"])


def table(cells: dict[str, Cell]) -> str:
    """The plans of every trial that were tuned in full, the best first."""
    lines = []
    for name, cell in cells.items():
        for place, plan in enumerate(tuned_in_full(cell), 1):
            rounds = [f"{kl:.3f}" for kl in plan["kl"].values()]
            best = "**chosen**" if plan["plan"] == chosen_of(cell)["plan"] else ""
            rounds += [""] * (max(len(each["kl"]) for each in cell["tried"]) - len(rounds))
            full = [f"{plan['tuned']:.3f}", str(place), best]
            lines.append([name, str(plan["gone"]), f"{plan['price_nats']:.3f}", *rounds, *full])
    counts = max((plan["kl"] for cell in cells.values() for plan in cell["tried"]), key=len)
    heads = ["trial", "blocks gone", "price", *(f"KL after {int(count):,} tokens" for count in counts)]
    return markdown([*heads, "in full, on other text", "place", ""], lines)


def bar(cells: dict[str, Cell]) -> Bar:
    """Whether the chosen plan is among the best in each trial."""
    places = {name: place_of(cell) for name, cell in cells.items()}
    shown = ", ".join(f"{name}: {place} of {len(tuned_in_full(cells[name]))}" for name, place in places.items())
    reached = len(places) >= 3 and max(places.values()) <= BEST
    return Bar(
        "halving: the chosen plan after full tuning", f"among the best {BEST} of eight, in 3 of 3", shown, reached
    )
