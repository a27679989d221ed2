from dataclasses import replace

import pytest
from support.bench_samples import FACTS, measurement, result, sample

from bench.measure.result import INVALID, Energy, ModelFacts
from bench.power.sensors import NO_SENSOR, NOT_ALLOWED
from bench.report.tables import (
    Table,
    detail_table,
    energy_notes,
    main_table,
    markdown,
    markdown_cell,
    peer_notes,
    table_rows,
)
from export.bundle.manifest import Spelling

BROKEN = measurement("broken", [], status=INVALID, reasons=["exit 1", "boom"], model=ModelFacts())


def test_unknown_is_a_dash() -> None:
    r = result(measurement("dense", [0.02, 0.025, 0.04]), BROKEN)
    row, broken = table_rows(r)
    assert row["decode_ts"] == pytest.approx(40)
    assert row["ceiling_fraction"] == pytest.approx(40 / (1e10 / 2_010_500))
    assert row["achieved_bytes_per_s"] == pytest.approx(40 * 2_010_500)
    assert broken["decode_ts"] is None and broken["peak_load_bytes"] is None
    table = main_table(r)
    assert table.header[:6] == ["name", "threads", "prefill tok/s", "decode tok/s", "decode IQR", "first token ms"]
    assert table.rows[0] == ["dense", "1", "400.0", "40.0", "32.5-45.0", "21.0", "100.0", "120.0", "1", "OK"]
    assert table.rows[1] == ["broken", "1", *["-"] * 7, "INVALID"]


def test_details_are_of_single_steps_and_of_memory() -> None:
    samples = [sample([0.01, 0.02, 0.03, 0.04], order, pss_bytes=90_000_000 + order) for order in (0, 1)]
    (row,) = detail_table(result(measurement("dense", [], samples=samples, cold_load_s=1.5))).rows
    assert row == [
        "dense", "1", "2", "500", "1500", "25.00", "40.00", "40.00", "0.1", "60.0", "50.0", "90.0", "-", "0.0", "3.0",
    ]  # fmt: skip


def test_columns_appear_where_they_say_something() -> None:
    energy = Energy(decode_j=2.0, window_s=1.0, idle_w=None, scope="package", source="rapl", rate_hz=10.0)
    measured = measurement("dense", [], samples=[sample([0.1] * 4, energy=energy)])
    table = main_table(result(measured, measurement("dense", [0.1], n_depth=16)))
    assert [row[table.header.index("test")] for row in table.rows] == ["pp8+tg4", "pp8+tg4@d16"]
    assert [row[table.header.index("J/ token")] for row in table.rows] == ["0.500", "-"]
    assert table_rows(result(measured))[0]["energy_scope"] == "package"
    guessed = measurement("dense", [], samples=[sample([0.1] * 4, energy=replace(energy, estimate=True))])
    assert "~0.500" in main_table(result(guessed)).rows[0] and "0.500" in main_table(result(measured)).rows[0]


def test_a_text_is_what_models_of_other_words_are_compared_by() -> None:
    dense, slim = (
        measurement(name, [0.02, 0.02], model=replace(FACTS, spelling=Spelling("a text", length)))
        for name, length in (("dense", 4.0), ("slim", 3.2))
    )
    table = main_table(result(dense, slim, measurement("peer", [0.01])))
    assert [row[table.header.index("ms/ char")] for row in table.rows] == ["5.00", "6.25", "-"]
    assert peer_notes(result(dense, slim)) == [
        "ms per character are of a text; characters per token: dense 4.00, slim 3.20"
    ]
    assert peer_notes(result(dense, replace(dense, name="again"))) == []
    assert "ms/ char" not in main_table(result(measurement("peer", [0.01]))).header


def test_what_the_energy_is_of() -> None:
    energy = Energy(2.0, 1.0, 4.5, "pmic_rails", "PMIC", 2.0, estimate=True)
    measured = measurement("dense", [], samples=[sample([0.1] * 4, energy=energy)])
    power = {"source": "PMIC", "scope": "pmic_rails", "covers": "its rails", "rate_hz": 2.0, "estimate": True}
    assert energy_notes(result(measured, settings={"power": {**power, "reasons": ["INA3221 is broken"]}})) == [
        "energy: PMIC, pmic_rails: its rails (an estimate, idle 4.50 W included)",
        "passed over: INA3221 is broken",
    ]
    short = measurement("dense", [], samples=[sample([0.1] * 4, unknown={"energy": "1 power readings"})])
    assert energy_notes(result(short, settings={"power": {**power, "reasons": []}})) == [
        "no energy of PMIC: 1 power readings"
    ]
    plain = measurement("dense", [0.1])
    assert energy_notes(result(plain, settings={"power": {"source": None, "reasons": [NOT_ALLOWED]}})) == [
        f"no energy: {NOT_ALLOWED}"
    ]
    assert energy_notes(result(plain, settings={"power": {"source": None, "reasons": [NO_SENSOR]}})) == []
    assert energy_notes(result(plain)) == []  # results from before


def test_markdown_has_no_markup_of_names() -> None:
    hostile = "a|b <img> [x](y) _c_ `d` \\| \n"
    shown = result(measurement(hostile, [0.02] * 3))
    for table in (main_table(shown), detail_table(shown)):
        lines = markdown(table).strip().splitlines()
        assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert markdown_cell(hostile) == r"a&#124;b &lt;img&gt; \[x\](y) \_c\_ \`d\` \\&#124; ?"
    assert markdown(Table(["h"], [["12.5-13"]])) == "| h |\n| --- |\n| 12.5-13 |\n"
