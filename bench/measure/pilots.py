"""A runtime at its best: what its users would choose is tried in short runs, before anything is measured.

A peer that is measured with the slower of its settings flatters whoever stands beside it. So a runtime with a setting
that matters (flash attention of llama.cpp: a third of decode on one CPU, a quarter of the prompt on it, the other way)
takes turns with itself, and goes on with the setting that is faster in decode. Where another one is faster in prefill,
it is measured too, in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from bench.measure.options import BenchOptions, Setting
from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.base.wording import counted

if TYPE_CHECKING:
    from bench.measure.result import Bursts
    from bench.runtimes.peers import Peer

PILOT_S = 8.0  # of turns for each number of threads
LOAD_S = 1.0
READ = 1 << 22
LEAST_GAIN = 0.02  # of its time: less is noise, and the runtime's own default stays


@dataclass(frozen=True)
class Pilot:
    """Times of one peer by setting, with one number of threads: seconds of a token and of the prompt."""

    name: str
    n_threads: int
    decode_s: dict[str, float]  # by setting; empty where nothing is decoded, or nothing was learnt
    prefill_s: dict[str, float]
    failure: str | None = None  # why the default stays

    @property
    def best(self) -> list[str]:
        """The fastest in decode, and the fastest in prefill where that is another one."""
        return list(dict.fromkeys(fastest(times) for times in (self.decode_s, self.prefill_s) if times))


def fastest(times: dict[str, float]) -> str:
    """Return the fastest setting; the first is the default."""
    default, best = next(iter(times)), min(times, key=lambda setting: times[setting])
    return best if times[best] < (1 - LEAST_GAIN) * times[default] else default


def at_their_best(
    peers: Sequence[Peer], options: BenchOptions, progress: Progress | None = None
) -> tuple[list[Peer], list[Pilot]]:
    """Return the peers with the settings that are fastest here, one or two for each, and the pilots' results.

    ``options.choice`` is taken as it is where a runtime has it.

    Raises UserError: no runtime has it.
    """
    chosen, pilots = [], []
    if options.choice is not None and not any(options.choice in peer.row.choices for peer in peers):
        known = ", ".join(dict.fromkeys(each for peer in peers for each in peer.row.choices)) or "none here"
        raise UserError(f"choice {options.choice!r} is no setting of what is measured: {known}")
    for peer in peers:
        if len(peer.row.choices) < 2:
            chosen.append(peer)
            continue
        if options.choice is not None:
            chosen.append(replace(peer, choice=options.choice if options.choice in peer.row.choices else None))
            continue
        by_threads = groupby(options.settings(), key=lambda setting: setting.threads)
        longest = [max(group, key=lambda setting: setting.positions) for _, group in by_threads]  # most to gain there
        mine = [pilot_of(peer, setting, options, progress) for setting in longest]
        pilots += mine
        best = list(dict.fromkeys(setting for pilot in mine for setting in pilot.best)) or [peer.row.choices[0]]
        chosen.append(replace(peer, choice=best[0]))
        chosen += [replace(peer, choice=each, name=f"{peer.name}, {each}") for each in best[1:]]
    return chosen, pilots


def pilot_of(peer: Peer, setting: Setting, options: BenchOptions, progress: Progress | None) -> Pilot:
    """Time each of a peer's settings, in turns."""
    from bench.measure.bursts import take_bursts

    if peer.path.is_file():  # a first load from storage is no pilot
        with peer.path.open("rb") as file:
            while file.read(READ):
                pass
    players = [replace(peer, choice=each, name=each) for each in peer.row.choices]

    def report(label: str, done: float, total: float) -> None:
        advance(progress, f"trying settings (s), {peer.name}", done, total)

    turns = take_bursts(players, setting, replace(options, ratio_time_s=PILOT_S), report, load_s=LOAD_S)
    decode, prefill = _medians(turns, "token_s"), _medians(turns, "prefill_s")
    return Pilot(peer.name, setting.threads, decode, prefill, turns.failure)


def _medians(turns: Bursts, what: str) -> dict[str, float]:
    """Seconds by player; of a load its median, of several loads theirs."""
    loads = [getattr(load, what) for load in turns.loads]
    medians = {
        name: [float(np.median(load[place])) for load in loads if load[place]] for place, name in enumerate(turns.names)
    }
    return {name: float(np.median(values)) for name, values in medians.items()} if all(medians.values()) else {}


def sentence(pilot: Pilot) -> str:
    """One line for a person."""
    if not pilot.best:
        return f"{pilot.name}: its settings were not tried: {pilot.failure or 'nothing was timed'}"
    parts = []
    for what, times in (("decode", pilot.decode_s), ("prefill", pilot.prefill_s)):
        if times:
            best = fastest(times)
            others = [f"{value / times[best]:.2f}x the time {name}" for name, value in times.items() if name != best]
            parts.append(f"{what} {best} ({', '.join(others)})")
    return f"{pilot.name}, {counted(pilot.n_threads, 'thread')}, fastest: {'; '.join(parts)}"
