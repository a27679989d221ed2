"""Lines of every JetPack: retyped ones with values checked by hand, invented ones from the grammar, and garbage."""

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tegrastats_lines import Line, lines, values_of

from devices.probe.tegrastats import Core, Engine, Memory, Rail, Tegrastats, Temperature, parse_tegrastats

MIB = 1 << 20

NANO_4 = (
    "RAM 1923/3964MB (lfb 2x2MB) SWAP 191/1982MB (cached 6MB) IRAM 0/252kB(lfb 252kB) CPU [5%@1224,4%@1224,3%@1224,"
    "6%@1224] EMC_FREQ 0%@1600 GR3D_FREQ 0%@76 APE 25 PLL@37C CPU@40C PMIC@50C GPU@40C AO@45C thermal@40C "
    "POM_5V_IN 1750/1628 POM_5V_GPU 0/0 POM_5V_CPU 366/406"
)
TX2_28 = (
    "RAM 2586/7846MB (lfb 1x1MB) cpu [17%,13%,off,5%]@408 EMC 1%@408 APE 150 GR3D 3%@76 NVENC 716 MTS fg 0% bg 2% "
    "Tdiode@37.75C thermal@40.2C VDD_IN 3177/3177 VDD_4V0_WIFI 0/0"
)
AGX_XAVIER_4 = (
    "RAM 10881/31919MB (lfb 4230x4MB) CPU [17%@1190,off] EMC_FREQ 55%@2133 GR3D_FREQ 95%@1377 APE 150 MTS fg 0% bg 10% "
    "AO@48C GPU@54.5C PMIC@100C CPU@49C GPU 18401/18525 CPU 2301/2330 SOC 4602/4602 CV 0/0 VDDRQ 2914/2911"
)
XAVIER_NX_5 = (
    "07-09-2024 13:31:31 RAM 3168/6851MB (lfb 2x4MB) SWAP 161/3426MB (cached 0MB) CPU [23%@1397,17%@1192] "
    "EMC_FREQ 2%@204 GR3D_FREQ 0%@[114] VIC_FREQ 115 APE 150 AUX@45C CPU@46.5C VDD_IN 2763mW/2846mW VDD_SOC 650mW/711mW"
)
AGX_ORIN_6 = (
    "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [14%@2188,5%@2112] "
    "EMC_FREQ 3%@2133 GR3D_FREQ 0%@[0,0] NVENC 79%@166 NVDEC off NVJPG1 off VIC 36%@115 PVA0_FREQ off APE 174 "
    "cpu@52.562C CV0@-256C tj@52.562C VDD_GPU_SOC 2412mW/2412mW VIN_SYS_5V0 4707mW/4657mW NC 0mW/0mW NC 0mW/0mW"
)
ORIN_NX_7 = (
    "10-01-2026 20:36:35 RAM 2432/15598MB (lfb 4x4MB) SWAP 0/6144MB (cached 0MB) CPU [55%@1036,off,off,0%@729] "
    "GR3D_FREQ 0% cpu@57.156C/58.25C VDD_IN 7280mW/7290mW/7400mW"
)
THOR_7 = (
    "07-23-2026 15:29:26 RAM 9101/125811MB (lfb 19x4MB) CPU [39%@2160] EMC_FREQ 7%@3200 GR3D_FREQ @[314,314,314] "
    "NVENC0_FREQ @1556 VIC 59%@423 PVA0_FREQ off APE 300 gpu@35.906C/36.1C VDD_GPU -12mW/4925mW/4930mW "
    "VIN 16802mW/1mW/2mW"
)
WHOLE = [NANO_4, TX2_28, AGX_XAVIER_4, XAVIER_NX_5, AGX_ORIN_6, ORIN_NX_7, THOR_7]


def test_jetson_nano_on_jetpack_4() -> None:
    assert parse_tegrastats(NANO_4) == Tegrastats(
        ram=Memory(1923 * MIB, 3964 * MIB, free_block_bytes=2 * MIB, free_blocks=2),
        swap=Memory(191 * MIB, 1982 * MIB, cached_bytes=6 * MIB),
        iram=Memory(0, 258_048, free_block_bytes=258_048),
        cores=tuple(Core(True, load, 1_224_000_000) for load in (0.05, 0.04, 0.03, 0.06)),
        engines={
            "EMC": Engine(load=0.0, clocks_hz=(1_600_000_000,)),
            "GR3D": Engine(load=0.0, clocks_hz=(76_000_000,)),
            "APE": Engine(clocks_hz=(25_000_000,)),
        },
        temperatures={
            name: Temperature(value)
            for name, value in (
                ("PLL", 37.0), ("CPU", 40.0), ("PMIC", 50.0), ("GPU", 40.0), ("AO", 45.0), ("thermal", 40.0)
            )
        },
        rails={"POM_5V_IN": Rail(1.75, 1.628), "POM_5V_GPU": Rail(0.0, 0.0), "POM_5V_CPU": Rail(0.366, 0.406)},
    )  # fmt: skip


def test_one_clock_for_all_cores_and_plain_names_in_l4t_28() -> None:
    line = parse_tegrastats(TX2_28)
    assert line.cores == (Core(True, 0.17, 408_000_000), Core(True, 0.13, 408_000_000), Core(False),
                          Core(True, 0.05, 408_000_000))  # fmt: skip
    assert line.engines["EMC"] == Engine(load=0.01, clocks_hz=(408_000_000,))
    assert line.engines["GR3D"] == Engine(load=0.03, clocks_hz=(76_000_000,))
    assert line.engines["NVENC"] == Engine(clocks_hz=(716_000_000,))
    assert (line.mts_foreground, line.mts_background) == (0.0, 0.02)
    assert line.local_time is None and line.swap is None and line.unparsed == ()


def test_rails_called_cpu_and_gpu_beside_cores_and_zones_of_that_name() -> None:
    line = parse_tegrastats(AGX_XAVIER_4)
    assert line.cores == (Core(True, 0.17, 1_190_000_000), Core(False))
    assert line.temperatures["CPU"] == Temperature(49.0) and line.temperatures["GPU"] == Temperature(54.5)
    assert line.rails["CPU"] == Rail(2.301, 2.33) and line.rails["GPU"] == Rail(18.401, 18.525)
    assert line.rails["VDDRQ"] == Rail(2.914, 2.911)
    assert line.engines["GR3D"] == Engine(load=0.95, clocks_hz=(1_377_000_000,)) and line.unparsed == ()


def test_xavier_nx_on_jetpack_5() -> None:
    line = parse_tegrastats(XAVIER_NX_5)
    assert line.local_time == datetime(2024, 7, 9, 13, 31, 31)
    assert line.engines["GR3D"] == Engine(load=0.0, clocks_hz=(114_000_000,))
    assert line.engines["VIC"] == Engine(clocks_hz=(115_000_000,))
    assert line.rails == {"VDD_IN": Rail(2.763, 2.846), "VDD_SOC": Rail(0.65, 0.711)}


def test_agx_orin_with_engines_off_a_gated_zone_and_channels_not_connected() -> None:
    line = parse_tegrastats(AGX_ORIN_6)
    assert line.engines["GR3D"] == Engine(load=0.0, clocks_hz=(0, 0))
    assert line.engines["NVENC"] == Engine(load=0.79, clocks_hz=(166_000_000,))
    assert line.engines["NVDEC"] == line.engines["NVJPG1"] == line.engines["PVA0"] == Engine(off=True)
    assert line.temperatures["cpu"] == Temperature(52.562) and line.temperatures["CV0"] == Temperature(None)
    assert line.rails == {"VDD_GPU_SOC": Rail(2.412, 2.412), "VIN_SYS_5V0": Rail(4.707, 4.657)}
    assert line.unparsed == ()


def test_orin_nx_on_jetpack_7_with_cores_off() -> None:
    line = parse_tegrastats(ORIN_NX_7)
    assert line.cores == (Core(True, 0.55, 1_036_000_000), Core(False), Core(False), Core(True, 0.0, 729_000_000))
    assert "EMC" not in line.engines  # without root
    assert line.engines["GR3D"] == Engine(load=0.0)
    assert line.temperatures == {"cpu": Temperature(57.156, 58.25)}
    assert line.rails == {"VDD_IN": Rail(7.28, 7.29, 7.4)}


def test_thor_tells_clocks_only_and_power_below_zero() -> None:
    line = parse_tegrastats(THOR_7)
    assert line.engines["GR3D"].load is None  # unknown, not 0
    assert line.engines["GR3D"].clocks_hz == (314_000_000,) * 3
    assert line.engines["NVENC0"] == Engine(clocks_hz=(1_556_000_000,))
    assert line.temperatures["gpu"] == Temperature(35.906, 36.1)
    assert line.rails == {"VDD_GPU": Rail(-0.012, 4.925, 4.93), "VIN": Rail(16.802, 0.001, 0.002)}
    assert line.unparsed == ()


def test_what_is_missing_is_unknown() -> None:
    nothing = Tegrastats()
    assert parse_tegrastats("") == parse_tegrastats(b" \r\n") == nothing
    assert (nothing.ram, nothing.cores, nothing.mts_background) == (None,) * 3 and nothing.engines == {}


@pytest.mark.parametrize(
    ("line", "unparsed"),
    [
        ("MB (lfb 25x4MB) GR3D_FREQ 1%", ("MB", "(lfb", "25x4MB)")),
        ("GR3D_FREQ 1% VDD_IN 4824mW/48", ("VDD_IN", "4824mW/48")),
        ("GR3D_FREQ 1% VDD_IN 48", ("VDD_IN 48",)),  # not an engine of 48 MHz
        ("GR3D_FREQ 1% RAM 3452/76", ("RAM 3452/76",)),  # nor a rail of 3.452 W
        ("GR3D_FREQ 1% SWAP 1518", ("SWAP 1518",)),
        ("GR3D_FREQ 1% IRAM 0/252", ("IRAM 0/252",)),
        ("GR3D_FREQ 1% tj@53.9", ("tj@53.9",)),
        ("GR3D_FREQ 1% CPU [5%@1224,4%@12", ("CPU", "[5%@1224,4%@12")),
        ("GR3D_FREQ 1% CPU [5%@1224,half]", ("CPU [5%@1224,half]",)),
        ("GR3D_FREQ 1% GR3D_FREQ 2%", ("GR3D_FREQ 2%",)),  # two lines glued together
        ("13-45-2024 10:00:00 GR3D_FREQ 1%", ("13-45-2024 10:00:00",)),
        ("GR3D_FREQ 1% APE \u0663", ("APE", "\u0663")),  # a digit, but not one of theirs
        (f"GR3D_FREQ 1% APE {'9' * 5000}", ("APE", "9" * 5000)),
    ],
)
def test_cut_and_broken_pieces_are_listed_and_the_rest_is_read(line: str, unparsed: tuple[str, ...]) -> None:
    read = parse_tegrastats(line)
    assert read.unparsed == unparsed
    assert read == Tegrastats(engines={"GR3D": Engine(load=0.01)}, unparsed=unparsed)


def test_a_line_without_end_is_not_read_to_its_end() -> None:
    read = parse_tegrastats("APE 1 " + "x " * 1_000_000)
    assert read.engines == {"APE": Engine(clocks_hz=(1_000_000,))}
    assert read.unparsed[-1] == "..." and len(read.unparsed) < 40_000


@given(lines(), st.sampled_from(["", " ", "\n", "\r\n"]))
@settings(deadline=None, max_examples=100)
def test_every_line_of_the_grammar_is_read_exactly(line: Line, end: str) -> None:
    assert parse_tegrastats(line.text + end) == line.wanted
    assert parse_tegrastats((line.text + end).encode()) == line.wanted


@given(lines(), st.integers(0, 400), st.integers(0, 400))
@settings(deadline=None, max_examples=80)
def test_a_line_cut_at_either_end_keeps_its_whole_pieces(line: Line, start: int, end: int) -> None:
    text = line.text
    start, end = min(start, len(text)), max(0, len(text) - end)
    place, whole, broken = 0, [], []
    for piece, read in line.pieces:
        inside = start <= place and place + len(piece) <= end
        (whole if inside else broken).append((text[max(place, start) : min(place + len(piece), end)], read))
        place += len(piece) + 1
    cut = parse_tegrastats(text[start:end])
    taken = {key for fragment, _ in broken for key in values_of(parse_tegrastats(fragment))}
    values = values_of(cut)
    for _, read in whole:
        assert {key: values.get(key) for key in read if key not in taken} == {
            key: value for key, value in read.items() if key not in taken
        }
    assert all(any(piece in fragment for fragment, _ in broken) for piece in cut.unparsed if whole and not taken)


@given(st.text() | st.binary())
@settings(deadline=None, max_examples=100)
def test_garbage_never_raises(garbage: str | bytes) -> None:
    assert isinstance(parse_tegrastats(garbage), Tegrastats)


ALPHABET = st.sampled_from(
    [*"0123456789%@[](),/-. CmWkMB", "off", "RAM ", "CPU [", "@[", "mW/", "MTS fg ", "\x00", "\xe9"]
)


@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 9), ALPHABET), max_size=8))
@settings(deadline=None, max_examples=150)
def test_mutated_lines_never_raise(line: str, edits: list[tuple[int, int, str]]) -> None:
    for place, length, text in edits:
        line = line[:place] + text + line[place + length :]
    read = parse_tegrastats(line)
    assert all(piece in line for piece in read.unparsed)
    for core in read.cores or ():
        assert core.online is (core.load is not None)


def test_recorded_lines(data_dir: Path) -> None:
    """Whole lines of boards: nothing left over, and values that a board can have."""
    recorded = sorted((data_dir / "tegrastats").glob("*.txt"))
    assert recorded, f"{data_dir} has no tegrastats/*.txt"
    for line in (line for file in recorded for line in file.read_text().splitlines() if line.strip()):
        read = parse_tegrastats(line)
        assert read.unparsed == (), line
        assert read.ram is not None and 0 < read.ram.used_bytes < read.ram.total_bytes < 1 << 38
        assert read.cores and all(core.load is None or 0 <= core.load <= 1 for core in read.cores)
        assert all(core.clock_hz is None or 1e8 <= core.clock_hz <= 3e9 for core in read.cores)
        assert all(0 <= (engine.load or 0) <= 1 for engine in read.engines.values())
        zones = [zone.now_c for zone in read.temperatures.values() if zone.now_c is not None]
        assert len(zones) >= 4 and all(10 < value < 110 for value in zones)
        assert read.rails and all(-1 < rail.now_w < 130 for rail in read.rails.values())
        dated = line[:2].isdigit()
        assert (read.local_time is not None) is dated
