from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.bench_samples import measurement, result, sample

from bench.measure.result import INVALID, ModelFacts, ResultError, command_line, read_result, write_result


def test_round_trip(tmp_path: Path) -> None:
    before = result(
        measurement("dense", [0.02, 0.03]),
        measurement("broken", [], status=INVALID, reasons=["exit 1: boom"], model=ModelFacts(unknown={"bits": "?"})),
        quality={"perplexity": 12.5},
    )
    write_result(tmp_path / "deep" / "result.json", before)
    assert read_result(tmp_path / "deep" / "result.json") == before
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["result.json"]


def test_a_command_is_kept_without_the_folder_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/someone/venv/bin/saap", "bench", "out/a", "-t", "1"])
    assert command_line() == ["saap", "bench", "out/a", "-t", "1"]


def test_only_raw_samples_are_stored(tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", result(measurement("dense", [0.02, 0.03])))
    stored = json.loads((tmp_path / "r.json").read_text())["measurements"][0]
    assert stored["samples"][1]["token_s"] == [0.03] * 4
    assert not {"avg_ts", "median", "stddev_ts"} & set(stored)


def test_statistics_on_reading() -> None:
    m = measurement("dense", [0.02, 0.025, 0.04])
    assert m.decode_ts == pytest.approx([50, 40, 25])
    assert m.prefill_ts == pytest.approx([400] * 3)
    assert m.avg_ts == pytest.approx(115 / 3)
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


def _edited(path: Path, **changes: object) -> Path:
    write_result(path, result(measurement("dense", [0.02, 0.03])))
    document = json.loads(path.read_text())
    for key, value in changes.items():
        target, *rest = key.split("__")
        if rest:
            document["measurements"][0]["samples"][0][rest[0]] = value
        else:
            document[target] = value
    document.pop("checksum")
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 3}, "schema 3, this saap reads 1 and 2"),
        ({"measurements": 3}, "damaged"),
        ({"novelty": 1}, "damaged"),
        ({"s__token_s": [0.1, 0.1]}, "2 token times for n_gen 4"),
        ({"s__token_s": [0.1, 0.1, 0.1, 0]}, "token_s must be positive"),
        ({"s__prefill_s": "fast"}, "Expected `float | null`.*prefill_s"),
        ({"s__load_s": 0}, "load_s must be positive"),
        (
            {
                "s__energy": {
                    "decode_j": "1",
                    "window_s": 1.0,
                    "idle_w": None,
                    "scope": "x",
                    "source": "x",
                    "rate_hz": 1,
                }
            },
            r"Expected `float`, got `str` - at `\$.*decode_j`",
        ),
        ({"s__counters": [1]}, "got `array`.*counters"),
        ({"device": 3}, "got `int`.*device"),
    ],
)
def test_wrong_documents_are_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ResultError, match=message) as caught:
        read_result(_edited(tmp_path / "r.json", **changes))
    assert "\n" not in str(caught.value) and "r.json" in str(caught.value)
    assert caught.value.exit_code == 2


def test_truncated_missing_and_foreign_files(tmp_path: Path) -> None:
    path = _edited(tmp_path / "r.json")
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ResultError, match="damaged"):
        read_result(path)
    with pytest.raises(ResultError, match="No such file"):
        read_result(tmp_path / "none.json")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="not UTF-8"):
        read_result(path)
    path.write_text("[1]")
    with pytest.raises(ResultError, match="not an object"):
        read_result(path)
