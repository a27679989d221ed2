from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.compare import compare
from bench.llama_bench import from_llama_bench, is_llama_bench, to_llama_bench
from bench.result import INVALID
from bench.store import ResultError, read_result, result_text
from tests.bench_samples import measurement, result

OURS = measurement("dense", [0.02, 0.03], n_depth=16)


def entry(**fields: Any) -> dict[str, Any]:
    """What llama-bench prints, in its fields and types."""
    values = {
        "build_commit": "0104b151", "build_number": 7000, "cpu_info": "Some CPU", "gpu_info": "", "backends": "CPU",
        "model_filename": "models/tiny.Q4_0.gguf", "model_type": "llama 1B Q4_0", "model_size": 500,
        "model_n_params": 1000, "n_batch": 2048, "n_threads": 2, "type_k": "f16", "flash_attn": 0, "n_prompt": 0,
        "n_gen": 10, "n_depth": 0, "test_time": "2025-04-24T11:58:50Z", "avg_ns": 150, "stddev_ns": 70, "avg_ts": 1.0,
        "stddev_ts": 0.1, "samples_ns": [100_000_000, 200_000_000], "samples_ts": [100.0, 50.0],
    }  # fmt: skip
    return {**values, **fields}


def test_a_run_becomes_a_prompt_entry_and_a_generation_entry() -> None:
    prompt, generation = to_llama_bench(result(OURS))
    assert [prompt[key] for key in ("n_prompt", "n_gen", "n_depth", "n_threads")] == [8, 0, 16, 1]
    assert [generation[key] for key in ("n_prompt", "n_gen", "n_depth", "n_threads")] == [0, 4, 24, 1]
    assert generation["samples_ns"] == [80_000_000, 120_000_000]
    assert (generation["avg_ns"], generation["stddev_ns"]) == (100_000_000, 28_284_271)
    assert generation["samples_ts"] == [pytest.approx(50), pytest.approx(100 / 3)]
    assert (generation["model_filename"], generation["model_size"], generation["backends"]) == (
        "out/dense", 3_000_000, "CPU",
    )  # fmt: skip
    assert "model_type" not in generation and "build_commit" not in generation


def test_combined_is_one_sum() -> None:
    (both,) = to_llama_bench(result(OURS), combined=True)
    assert (both["n_prompt"], both["n_gen"], both["n_depth"]) == (8, 4, 16)
    assert both["samples_ns"] == [100_000_000, 140_000_000]
    assert both["samples_ts"][0] == pytest.approx(12 / 0.1)


def test_an_invalid_measurement_is_not_written() -> None:
    assert to_llama_bench(result(measurement("dense", [0.02], status=INVALID), measurement("none", []))) == []


def test_reading_generation_and_prompt() -> None:
    read = from_llama_bench(json.dumps([entry(), entry(n_prompt=10, n_gen=0, n_depth=32)]))
    decode, prefill = read.measurements
    assert (decode.name, decode.test, decode.n_threads, decode.kind) == ("tiny.Q4_0", "tg10", 2, "llama.cpp")
    assert decode.decode_ts == [pytest.approx(100), pytest.approx(50)] and decode.steps_s == []
    assert (prefill.test, prefill.prefill_ts) == ("pp10@d32", [pytest.approx(100), pytest.approx(50)])
    assert (decode.model.parameters, decode.model.model_bytes, decode.samples[0].load_s) == (1000, 500, None)
    assert read.device == {"fingerprint": None, "cpu_model": "Some CPU", "gpu_model": None}
    assert (read.versions, read.created) == ({"llama.cpp": "7000 0104b151"}, "2025-04-24T11:58:50+00:00")
    assert from_llama_bench(result_text_of(read)).measurements[0].samples == decode.samples


def result_text_of(read: Any) -> str:
    return json.dumps(to_llama_bench(read))


def test_settings_that_differ_tell_entries_apart() -> None:
    read = from_llama_bench(json.dumps([entry(), entry(flash_attn=1), entry(flash_attn=1, n_gen=20)]))
    assert [m.name for m in read.measurements] == ["tiny.Q4_0, flash_attn 0", *["tiny.Q4_0, flash_attn 1"] * 2]
    windows = from_llama_bench(json.dumps([entry(model_filename="C:\\models\\a.gguf", backends="CUDA")]))
    assert (windows.measurements[0].name, windows.measurements[0].provider) == ("a", "cuda")


def test_a_sum_of_both_is_skipped_and_told() -> None:
    read = from_llama_bench(json.dumps([entry(n_prompt=5), entry()]))
    assert len(read.measurements) == 1
    assert read.settings == {"source": "llama-bench", "skipped": ["tiny.Q4_0: pp5+tg10 in one sum"]}
    with pytest.raises(ResultError, match="run llama-bench with -p and -n, not -pg"):
        from_llama_bench(json.dumps([entry(n_prompt=5)]))


@pytest.mark.parametrize("lines", [False, True])
def test_files_are_recognised_and_never_compared_with_ours(tmp_path: Path, lines: bool) -> None:
    entries = [entry(samples_ns=[10**8] * 6), entry(n_prompt=10, n_gen=0)]
    path = tmp_path / "theirs.json"
    path.write_text("\n".join(map(json.dumps, entries)) + "\n\n" if lines else json.dumps(entries, indent=2))
    read = read_result(path)
    assert [m.test for m in read.measurements] == ["tg10", "pp10"]
    assert compare(read, read).exit_code() == 3
    assert not is_llama_bench(result_text(result(OURS))) and not is_llama_bench(result_text(result(OURS), indent=1))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[", "truncated or not JSON"),
        ("[]", "nor a list of llama-bench entries"),
        ("[3]", "nor a list of llama-bench entries"),
        (json.dumps([{}]), "entry 1: no n_prompt"),
        (json.dumps([entry(samples_ns=[])]), "entry 1: samples_ns must be positive"),
        (json.dumps([entry(), entry(samples_ns=[1, -1])]), "entry 2: samples_ns must be positive"),
        (json.dumps([entry(n_gen="x")]), "n_gen must be a count, not 'x'"),
        (json.dumps([entry(n_gen=0)]), "neither n_prompt nor n_gen"),
        (json.dumps([entry(test_time=None)]), "entry 1: "),
        (json.dumps(entry()) + "\n{", "truncated"),
    ],
)
def test_damaged_documents_are_one_line(text: str, told: str) -> None:
    with pytest.raises(ResultError) as caught:
        from_llama_bench(text, "their.json")
    assert told in str(caught.value) and str(caught.value).startswith("their.json") and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
