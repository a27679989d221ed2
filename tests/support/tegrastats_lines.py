"""Lines of tegrastats, invented from its grammar. A piece is its text and what it must be read as."""

import string
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hypothesis import strategies as st

from devices.probe.tegrastats import Core, Engine, Memory, Rail, Tegrastats, Temperature

Read = dict[str, Any]  # a field of Tegrastats, or "rails NAME" for a name in one of its mappings

UPPER = string.ascii_uppercase
PERCENT = st.integers(0, 100)
MHZ = st.integers(0, 9999)
UNITS = {"kB": 1 << 10, "MB": 1 << 20}


@st.composite
def dates(draw: st.DrawFn) -> tuple[str, Read]:
    moment = draw(st.datetimes(datetime(2015, 1, 1), datetime(2099, 1, 1))).replace(microsecond=0)
    return moment.strftime("%m-%d-%Y %H:%M:%S"), {"local_time": moment}


@st.composite
def memories(draw: st.DrawFn, kind: str) -> tuple[str, Read]:
    unit = "kB" if kind == "IRAM" else "MB"
    used, total = draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6))
    text, fields = f"{kind} {used}/{total}{unit}", {}
    if draw(st.booleans()):
        size, size_unit = draw(st.integers(0, 9999)), draw(st.sampled_from(sorted(UNITS)))
        if kind == "SWAP":
            text += f" (cached {size}{size_unit})"
            fields = {"cached_bytes": size * UNITS[size_unit]}
        else:
            count = None if kind == "IRAM" else draw(st.integers(0, 99999))
            text += "(lfb " if kind == "IRAM" else f" (lfb {count}x"
            text += f"{size}{size_unit})"
            fields = {"free_block_bytes": size * UNITS[size_unit], "free_blocks": count}
    memory = Memory(used * UNITS[unit], total * UNITS[unit], **fields)
    return text, {kind.lower(): memory}


@st.composite
def cores(draw: st.DrawFn) -> tuple[str, Read]:
    loads = draw(st.lists(st.none() | PERCENT, min_size=1, max_size=16))
    shared = draw(st.none() | MHZ)
    clocks = [draw(MHZ) if shared is None else shared for _ in loads]
    each = [
        "off" if load is None else f"{load}%" + (f"@{clock}" if shared is None else "")
        for load, clock in zip(loads, clocks, strict=True)
    ]
    name = draw(st.sampled_from(["CPU", "cpu"])) if shared is not None else "CPU"
    text = f"{name} [{','.join(each)}]" + (f"@{shared}" if shared is not None else "")
    read = tuple(
        Core(False) if load is None else Core(True, load / 100, clock * 10**6)
        for load, clock in zip(loads, clocks, strict=True)
    )
    return text, {"cores": read}


@st.composite
def engines(draw: st.DrawFn) -> tuple[str, Read]:
    """Of any name: the memory controller, the GPU with one clock per GPC, codecs that are off."""
    known = ["EMC", "GR3D", "NVENC", "NVENC0", "NVDEC", "NVJPG1", "VIC", "APE", "OFA", "PVA0", "MSENC", "NVDLA0"]
    name = draw(st.sampled_from(known))
    load = draw(st.none() | PERCENT)
    share = "" if load is None else f"{load}%"
    form = draw(st.sampled_from(["off", "load", "clock", "clocks", "plain"]))
    if form == "off":
        text, engine = "off", Engine(off=True)
    elif form == "load":
        load = load or 0
        text, engine = f"{load}%", Engine(load=load / 100)
    elif form == "plain":
        clock = draw(MHZ)
        text, engine = str(clock), Engine(clocks_hz=(clock * 10**6,))
    else:
        clocks = draw(st.lists(MHZ, min_size=1, max_size=1 if form == "clock" else 4))
        joined = ",".join(map(str, clocks))
        text = f"{share}@{joined if form == 'clock' else f'[{joined}]'}"
        engine = Engine(load=None if load is None else load / 100, clocks_hz=tuple(clock * 10**6 for clock in clocks))
    return f"{name}{draw(st.sampled_from(['', '_FREQ']))} {text}", {f"engines {name}": engine}


@st.composite
def mts(draw: st.DrawFn) -> tuple[str, Read]:
    front, back = draw(PERCENT), draw(PERCENT)
    return f"MTS fg {front}% bg {back}%", {"mts_foreground": front / 100, "mts_background": back / 100}


@st.composite
def temperatures(draw: st.DrawFn) -> tuple[str, Read]:
    name = draw(st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,11}", fullmatch=True))
    now, highest = draw(st.integers(-40_000, 125_000)), draw(st.none() | st.integers(-40_000, 125_000))
    texts = [f"{milli / 1000:.3f}".rstrip("0").rstrip(".") for milli in (now, highest) if milli is not None]
    read = Temperature(now / 1000, None if highest is None else highest / 1000)
    return f"{name}@" + "/".join(f"{text}C" for text in texts), {f"temperatures {name}": read}


@st.composite
def rails(draw: st.DrawFn) -> tuple[str, Read]:
    name = draw(st.sampled_from(UPPER)) + draw(st.text(UPPER + string.digits + "_", max_size=15))
    name = "VDD_IN" if name in ("NC", "RAM", "SWAP", "IRAM") else name  # those are other pieces, cut before their unit
    values = draw(st.lists(st.integers(-9999, 200_000), min_size=2, max_size=3))
    unit = draw(st.sampled_from(["", "mW"]))
    return f"{name} " + "/".join(f"{value}{unit}" for value in values), {
        f"rails {name}": Rail(*(value / 1000 for value in values))
    }


PIECES = st.one_of(
    memories("RAM"), memories("SWAP"), memories("IRAM"), cores(), mts(), engines(), engines(), temperatures(),
    temperatures(), rails(), rails(),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    pieces: list[tuple[str, Read]]

    @property
    def text(self) -> str:
        return " ".join(text for text, _ in self.pieces)

    @property
    def wanted(self) -> Tegrastats:
        fields: Read = {"engines": {}, "temperatures": {}, "rails": {}}
        for key, value in (item for _, read in self.pieces for item in read.items()):
            kind, _, name = key.partition(" ")
            if name:
                fields[kind][name] = value
            else:
                fields[kind] = value
        return Tegrastats(**fields)


def values_of(line: Tegrastats) -> Read:
    """What a line tells, by the keys of its pieces."""
    values: Read = {}
    for kind, value in vars(line).items():
        if kind in ("engines", "temperatures", "rails"):
            values |= {f"{kind} {name}": each for name, each in value.items()}
        elif value is not None and kind != "unparsed":
            values[kind] = value
    return values


@st.composite
def lines(draw: st.DrawFn) -> Line:
    pieces = [draw(dates())] if draw(st.booleans()) else []
    seen: set[str] = set()
    for text, read in draw(st.lists(PIECES, max_size=24)):
        if not read.keys() & seen:
            seen |= read.keys()
            pieces.append((text, read))
    return Line(pieces)
