"""One line of NVIDIA's tegrastats, of any JetPack, as numbers in base units.

The order of the fields is not fixed, each may be missing, and a stream may be cut at either end. What each release
prints (L4T 28 to R39; NVIDIA, Jetson Linux Developer Guide, "Tegrastats Utility", and lines recorded on boards):

| field | forms |
|---|---|
| date | none up to JetPack 4; ``07-09-2024 13:31:31`` from 5 on: local time |
| memory | ``RAM 3452/7620MB (lfb 25x4MB)``, ``SWAP 1518/16384MB (cached 174MB)``, ``IRAM 0/252kB(lfb 252kB)`` |
| cores | ``CPU [5%@1224,off]``; one clock for all in L4T 28: ``cpu [17%,13%]@408`` |
| engines | ``EMC_FREQ 0%``, ``GR3D_FREQ 12%@[1300,1300]``, ``GR3D_FREQ @[314,314,314]``, ``NVENC off``, ``APE 150`` |
| MTS | ``MTS fg 1% bg 9%`` |
| temperatures | ``CPU@40C``; now and highest in R39: ``cpu@47.906C/48.343C`` |
| power | ``VDD_IN 4824/4810`` in JetPack 4, ``4824mW/4824mW`` in 5 and 6, now/average/highest in R39 |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

# tegrastats divides the kernel's kB by 1024: 7620MB on a board whose MemTotal is 7802672 kB.
_BYTES = {"kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
_MHZ = 1_000_000
_GATED_C = -256.0  # printed for a zone that is powered off
_NOT_CONNECTED = "NC"
_MEMORIES = ("RAM", "SWAP", "IRAM")
_LONGEST = 1 << 16  # characters that are looked at; a line of a real board has less than 2000


@dataclass(frozen=True)
class Memory:
    """RAM, swap or IRAM, in bytes."""

    used_bytes: int
    total_bytes: int
    free_block_bytes: int | None = None  # of the largest free block
    free_blocks: int | None = None  # how many there are of that size
    cached_bytes: int | None = None  # of swap


@dataclass(frozen=True)
class Core:
    """A CPU core. ``load`` is a share of its time, from 0 to 1, at the clock of the moment."""

    online: bool
    load: float | None = None
    clock_hz: int | None = None


@dataclass(frozen=True)
class Engine:
    """A memory controller (EMC), GPU (GR3D), codec and so on. Utilisation is unknown where only a clock is printed."""

    off: bool = False
    load: float | None = None  # share, from 0 to 1
    clocks_hz: tuple[int | None, ...] = ()  # one, or one per GPC of a GPU; empty: not printed


@dataclass(frozen=True)
class Temperature:
    """The temperature of a thermal zone, in degrees Celsius; None while the zone is gated (printed as -256C)."""

    now_c: float | None
    highest_c: float | None = None  # since tegrastats began


@dataclass(frozen=True)
class Rail:
    """Power of a rail in watts; may be negative. Average and highest are of the time since tegrastats began."""

    now_w: float
    average_w: float | None = None
    highest_w: float | None = None


@dataclass(frozen=True)
class Tegrastats:
    """A line. None, or a missing key, is what it does not tell.

    Names are those that are printed, but engines lose ``_FREQ``, which comes and goes with the release. Temperatures
    of zones without a sensor are as printed: ``PMIC`` is 50 or 100 on every board. ``EMC``, the memory controller, is
    absent without root from JetPack 6 on.
    """

    local_time: datetime | None = None  # of the board, whole seconds, without a zone
    ram: Memory | None = None
    swap: Memory | None = None
    iram: Memory | None = None
    cores: tuple[Core, ...] | None = None
    engines: Mapping[str, Engine] = field(default_factory=dict)
    mts_foreground: float | None = None  # shares of time
    mts_background: float | None = None
    temperatures: Mapping[str, Temperature] = field(default_factory=dict)
    rails: Mapping[str, Rail] = field(default_factory=dict)
    unparsed: tuple[str, ...] = ()  # pieces that were not understood, or came twice


def parse_tegrastats(line: str | bytes) -> Tegrastats:
    """Read a line. Never raises: what is not understood is listed in ``unparsed``.

    A number that is cut in the middle reads like a smaller one, so only whole lines should be given where their last
    field matters.
    """
    text = line.decode("utf-8", "replace") if isinstance(line, bytes | bytearray) else str(line)
    fields = _Fields()
    place = 0
    while (start := _WORD.search(text, place, _LONGEST)) is not None:
        end = fields.take(text, start.start())
        if end is None:  # a word that is none of the forms
            fields.unparsed.append(start[0])
        place = start.end() if end is None else end
    if text[_LONGEST:].strip():
        fields.unparsed.append("...")
    return Tegrastats(**fields.fields, unparsed=tuple(fields.unparsed))


class _Fields:
    """The fields of a line that have been read so far."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {"engines": {}, "temperatures": {}, "rails": {}}
        self.unparsed: list[str] = []

    def take(self, text: str, place: int) -> int | None:
        """Read the field that begins at ``place``; its end, or None if no field begins there."""
        for form, read in _FORMS:
            match = form.match(text, place, _LONGEST)
            if match is None:
                continue
            try:
                understood = read(self, match)
            except ValueError:  # a 13th month
                understood = False
            if not understood:
                self.unparsed.append(match[0])
            return match.end()
        return None

    def once(self, name: str, value: object) -> bool:
        """Keep the first of a name: two lines glued together must not mix."""
        return _once(self.fields, name, value)

    def date(self, match: re.Match[str]) -> bool:
        month, day, year, hour, minute, second = map(int, match.groups())
        return self.once("local_time", datetime(year, month, day, hour, minute, second))

    def memory(self, match: re.Match[str]) -> bool:
        kind, used, total, unit, blocks, block, block_unit, cached, cached_unit = match.groups()
        memory = Memory(
            used_bytes=int(used) * _BYTES[unit],
            total_bytes=int(total) * _BYTES[unit],
            free_block_bytes=int(block) * _BYTES[block_unit] if block else None,
            free_blocks=int(blocks) if blocks else None,
            cached_bytes=int(cached) * _BYTES[cached_unit] if cached else None,
        )
        return self.once(kind.lower(), memory)

    def cores(self, match: re.Match[str]) -> bool:
        cores = []
        for text in match[1].split(","):
            core = _CORE.fullmatch(text.strip())
            if core is None:
                return False
            clock = core["clock"] or match[2]
            online = core["load"] is not None
            cores.append(Core(online, _share(core["load"]), _hertz(clock) if online else None))
        return self.once("cores", tuple(cores))

    def mts(self, match: re.Match[str]) -> bool:
        first = self.once("mts_foreground", _share(match[1]))
        return first and self.once("mts_background", _share(match[2]))

    def temperature(self, match: re.Match[str]) -> bool:
        name, now, highest = match.groups()
        return _once(self.fields["temperatures"], name, Temperature(_degrees(now), _degrees(highest)))

    def rail(self, match: re.Match[str]) -> bool:
        name, now, average, highest, bare_now, bare_average, bare_highest = match.groups()
        if name == _NOT_CONNECTED:  # several of them in one line, with nothing behind
            return True
        if name in _MEMORIES:  # "RAM 3452/76", cut before its unit
            return False
        rail = Rail(
            now_w=int(now or bare_now) / 1000,
            average_w=_watts(average or bare_average),
            highest_w=_watts(highest or bare_highest),
        )
        return _once(self.fields["rails"], name, rail)

    def engine(self, match: re.Match[str]) -> bool:
        name = match["name"].removesuffix("_FREQ")
        if match["plain"] and (name in _MEMORIES or _NAMES_A_RAIL.match(name)):  # cut before its unit
            return False
        clocks = match["clocks"] or match["clock"] or match["plain"]
        engine = Engine(
            off=match["off"] is not None,
            load=_share(match["load"]),
            clocks_hz=tuple(_hertz(text.strip()) for text in clocks.split(",")) if clocks else (),
        )
        return _once(self.fields["engines"], name, engine)


def _once(fields: dict[str, Any], name: str, value: object) -> bool:
    if name in fields:
        return False
    fields[name] = value
    return True


def _share(percent: str | None) -> float | None:
    return None if percent is None else float(percent) / 100


def _hertz(megahertz: str | None) -> int | None:
    return None if megahertz in (None, "", "off") else round(float(megahertz) * _MHZ)


def _watts(milliwatts: str | None) -> float | None:
    return None if milliwatts is None else int(milliwatts) / 1000


def _degrees(text: str | None) -> float | None:
    return None if text is None or float(text) == _GATED_C else float(text)


# Numbers are bounded, as nothing that is longer is one; ASCII digits only.
_N = r"\d{1,12}"
_P = r"\d{1,4}(?:\.\d{1,6})?"
_CLOCK = r"\d{1,6}(?:\.\d{1,6})?"
_CELSIUS = r"-?\d{1,4}(?:\.\d{1,6})?"
_B = "[kMG]B"
_END = r"(?!\S)"


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern + _END, re.ASCII)


_WORD = re.compile(r"\S+")
_CORE = re.compile(rf"off|(?P<load>{_P})%(?:@(?P<clock>{_CLOCK}))?", re.ASCII)
_NAMES_A_RAIL = re.compile(r"VDD|VIN|POM|SYS5V|(?:GPU|CPU|SOC|CV|NC)$|.*_IN$|.*\dV\d")

_MEMORY = (
    rf"(RAM|SWAP|IRAM)\s+({_N})/({_N})({_B})"
    rf"(?:\s*\((?:lfb\s+(?:({_N})x)?({_N})({_B})|cached\s+({_N})({_B}))\))?"
)
# All with their unit, or none: "4824mW/48" was cut.
_POWER = rf"(?:(-?{_N})mW(?:/(-?{_N})mW(?:/(-?{_N})mW)?)?|(-?{_N})/(-?{_N})(?:/(-?{_N}))?)"
_ENGINE = (
    r"(?P<name>[A-Z][A-Z0-9_]*|EDP\s+limit)\s+"
    rf"(?:(?P<off>off)|(?P<plain>{_CLOCK})|(?=[\d@])(?:(?P<load>{_P})%)?"
    rf"(?:@(?:(?P<clock>{_CLOCK})|\[(?P<clocks>(?:\s*(?:{_CLOCK}|off)\s*,){{0,63}}\s*(?:{_CLOCK}|off)\s*)\]))?)"
)

# A name is a rail's where two values follow: on Xavier, JetPack 4, rails are called CPU and GPU.
_FORMS: tuple[tuple[re.Pattern[str], Callable[[_Fields, re.Match[str]], bool]], ...] = (
    (_form(r"(\d\d)-(\d\d)-(\d{4})\s+(\d\d):(\d\d):(\d\d)"), _Fields.date),
    (_form(_MEMORY), _Fields.memory),
    (_form(rf"(?:CPU|cpu)\s+\[([^\[\]]{{0,4096}})\](?:@({_CLOCK}))?"), _Fields.cores),
    (_form(rf"MTS\s+fg\s+({_P})%\s+bg\s+({_P})%"), _Fields.mts),
    (_form(rf"([A-Za-z0-9_][\w.+-]{{0,63}})@({_CELSIUS})C(?:/({_CELSIUS})C)?"), _Fields.temperature),
    (_form(rf"([A-Za-z0-9_]{{1,64}})\s+{_POWER}"), _Fields.rail),
    (_form(_ENGINE), _Fields.engine),
)
