import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from support.bench_samples import measurement, result, sample
from support.edited import edited

from bench.measure.result import INVALID, Measurement, ModelFacts, ResultError, command_line, read_result, write_result


def test_round_trip(tmp_path: Path) -> None:
    before = result(
        measurement("dense", [0.02, 0.03]),
        measurement("broken", [], status=INVALID, reasons=["exit 1: boom"], model=ModelFacts(unknown={"bits": "?"})),
        quality={"perplexity": 12.5},
    )
    write_result(tmp_path / "deep" / "result.json", before)
    assert read_result(tmp_path / "deep" / "result.json") == before
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["result.json"]
    stored = json.loads((tmp_path / "deep" / "result.json").read_text())["measurements"][0]
    assert set(stored) == {field.name for field in fields(Measurement)}  # and nothing that is computed on reading


def test_a_command_is_kept_without_the_folder_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/someone/venv/bin/saap", "bench", "out/a", "-t", "1"])
    assert command_line() == ["saap", "bench", "out/a", "-t", "1"]


def test_statistics_on_reading() -> None:
    m = measurement("dense", [0.02, 0.025, 0.04])
    assert m.decode_ts == pytest.approx([50, 40, 25])
    assert m.prefill_ts == pytest.approx([400] * 3)
    assert m.decode is not None and m.decode.median == pytest.approx(40)
    assert m.peak("peak_load_bytes") == 100_000_002
    assert m.bytes_per_token == 2_000_000 + 1000 * (8 + 2.5)


def test_ceiling() -> None:
    m = measurement("dense", [0.02])
    r = result(m)
    assert r.ceiling_ts(m) == pytest.approx(1e10 / 2_010_500)
    assert r.ceiling_ts(replace(m, n_threads=2)) is None  # not probed
    assert r.ceiling_ts(replace(m, model=ModelFacts())) is None
    in_cache = replace(r.bandwidth[0], last_level_cache_bytes=2_000_000)
    assert replace(r, bandwidth=[in_cache]).ceiling_ts(m) is None


def test_largest_peak_ignores_unknown() -> None:
    m = measurement("dense", [], samples=[sample([1.0], peak_decode_bytes=None), sample([1.0], peak_decode_bytes=7)])
    assert m.peak("peak_decode_bytes") == 7
    assert replace(m, samples=m.samples[:1]).peak("peak_decode_bytes") is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema", 3, "schema 3, this saap reads 1 and 2"),
        ("measurements", 3, "damaged"),
        ("novelty", 1, "damaged"),
        ("sample.token_s", [0.1, 0.1], "2 token times for n_gen 4"),
        ("sample.token_s", [0.1, 0.1, 0.1, 0], "token_s must be positive"),
        ("sample.prefill_s", "fast", "Expected `float | null`.*prefill_s"),
        ("sample.load_s", 0, "load_s must be positive"),
        ("sample.energy", {"decode_j": "1"}, r"Expected `float`, got `str` - at `\$.*decode_j`"),
        ("sample.counters", [1], "got `array`.*counters"),
        ("device", 3, "got `int`.*device"),
    ],
)
def test_wrong_documents_are_one_line(tmp_path: Path, field: str, value: object, message: str) -> None:
    def change(document: dict[str, Any]) -> None:
        of = document["measurements"][0]["samples"][0] if field.startswith("sample.") else document
        of[field.removeprefix("sample.")] = value

    write_result(tmp_path / "r.json", result(measurement("dense", [0.02, 0.03])))
    edited(tmp_path / "r.json", change)
    with pytest.raises(ResultError, match=message) as caught:
        read_result(tmp_path / "r.json")
    assert "\n" not in str(caught.value) and "r.json" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 2, "measure', "damaged"),
        (None, "No such file"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1]", "not an"),
    ],
)
def test_truncated_missing_and_foreign_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ResultError, match=message):
        read_result(tmp_path / "r.json")
