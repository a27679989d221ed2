import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bench_samples import instant_workers
from support.tiny_graphs import CONTEXT, VOCAB, tiny_bundle

from bench.measure import run as bench_run
from bench.measure.options import BenchOptions
from bench.measure.result import INVALID, Result, read_result, write_result
from bench.measure.run import measure
from bench.measure.worker import Repetition
from bench.runtimes.peers import PeerError
from export.bundle.manifest import BundleError
from export.engine.protocol import EngineError, EngineOptions
from export.engine.turns import random_tokens, turn
from saap.base.cores import choose_cores
from saap.base.errors import UserError
from saap.base.progress import Label

ROOT = Path(__file__).resolve().parents[3]
ONE = BenchOptions(prompt=4, generate=3, threads=1, repetitions=1, warmup=0, cold=False)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bundles")
    return [tiny_bundle(root / "dense"), tiny_bundle(root / "slim", seed=1)]


@pytest.fixture(scope="module")
def two(bundles: list[Path]) -> tuple[Result, list[tuple[str, float, float]]]:
    calls: list[tuple[str, float, float]] = []
    plan = BenchOptions(prompt=12, generate=10, threads=1, repetitions=2, warmup=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.measure.roofline.PASSES", 1)
        result = measure([str(b) for b in bundles], plan, progress=lambda *call: calls.append(call))
    return result, calls


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return instant_workers(monkeypatch)


def test_two_bundles_end_to_end(two: tuple[Result, object], tmp_path: Path) -> None:
    result, _ = two
    dense, slim = result.measurements
    assert (dense.name, slim.name) == ("dense", "slim")
    assert [s.order for s in dense.samples] == [0, 3] and [s.order for s in slim.samples] == [1, 2]
    for m in result.measurements:
        assert (m.n_prompt, m.n_gen, m.n_threads, m.kind) == (12, 10, 1, "onnx")
        assert m.affinity == choose_cores(1)
        assert m.model.vocab_size == VOCAB and m.model.model_bytes and m.bundle_hash
        for s in m.samples:
            assert len(s.token_s) == 10 and len(s.warmup_s) == 3
            assert 0 < s.prefill_s <= s.ttft_s
            assert s.peak_load_bytes and s.peak_decode_bytes and s.anonymous_bytes and s.file_bytes
            assert s.counters["swapped_pages"] is not None
            assert s.counters["clock_limit"] >= 0.03 and s.counters["clock_s"] > 0
            assert 0 < s.startup_s < 30 and 20e6 < s.base_bytes <= s.peak_load_bytes
            assert s.pss_bytes <= s.anonymous_bytes + s.file_bytes and s.available_drop_bytes is not None
            power, why = result.settings["power"], s.unknown.get("energy", "")
            assert s.energy.source == power["source"] if s.energy else "power" in why or [why] == power["reasons"]
        # A file system in memory has no cache to drop.
        assert (m.cold_load_s is not None and m.cold_load_s > 0) or "were read" in m.unknown["cold_load_s"]
        assert m.peak("peak_decode_bytes") < 120e6  # numpy and ONNX Runtime; a stray import of torch would show
    assert dense.bundle_hash != slim.bundle_hash
    assert result.device["fingerprint"] and result.versions["onnxruntime"]
    assert len(result.bandwidth[0].samples) == 2  # one pass before, one after
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result


def test_a_sweep_has_one_measurement_per_spec_and_setting(bundles: list[Path], jobs: list[dict[str, Any]]) -> None:
    plan = replace(ONE, prompt=(7, 0), generate=(3, 0), depth=(0, 5))
    result = measure([str(b) for b in bundles], plan)
    assert [m.test for m in result.of("dense")] == ["tg3", "pp7", "pp7+tg3", "tg3@d5", "pp7@d5", "pp7+tg3@d5"]
    assert len({m.key for m in result.measurements}) == 12
    lengths = [(len(job["context"]), len(job["prompt"]), job["n_gen"]) for job in jobs[::2]]
    assert lengths == [(1, 0, 3), (0, 7, 0), (0, 7, 3), (5, 0, 3), (5, 7, 0), (5, 7, 3)]
    with pytest.raises(EngineError, match="do not fit"):
        measure([str(bundles[0])], replace(plan, depth=CONTEXT - 5))


def test_prefill_or_decode_alone(bundles: list[Path]) -> None:
    result = measure([str(bundles[0])], replace(ONE, prompt=(7, 0), generate=(3, 0), depth=5))
    for m in result.measurements:
        (s,) = m.samples
        assert (s.prefill_s is None) == (m.n_prompt == 0) and len(s.token_s) == m.n_gen


def test_repetitions_end_when_the_ratio_is_known_or_time_is_up(bundles: list[Path], jobs: list[dict[str, Any]]) -> None:
    plan = replace(ONE, repetitions=None, precision=0.99, ratio_time_s=0)
    loose = measure([str(b) for b in bundles], plan)
    assert {len(m.samples) for m in loose.measurements} == {10}
    hurried = measure([str(bundles[0])], replace(plan, precision=1e-9, max_time_s=1e-9))
    assert len(hurried.measurements[0].samples) == 6


def test_too_little_memory_is_refused_with_the_sum(bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100000 kB\nMemAvailable: 40000 kB\n")
    with pytest.raises(PeerError, match=r"needs about \d+ MB \(weights \d+ \+ runtime 67 \+ cache \d+\) and 41 MB"):
        measure([str(bundles[0])], BenchOptions(threads=1, prompt=8, generate=8, root=tmp_path))


def test_progress_counts_repetitions(two: tuple[Result, list[tuple[str, float, float]]]) -> None:
    _, calls = two
    rounds = [(label, done) for label, done, _ in calls if ": round" in label or label == "bench (runs)"]
    assert [done for label, done in rounds if "," not in label.split(":")[-1]] == [0, 1, 2, 3, 4]
    assert ("bench (runs), slim: round 1", 1, 4.0) in calls and ("bench (runs)", 4, 4) in calls
    assert any("warm-up" in label for label, _, _ in calls)
    # What comes before and after the rounds takes seconds, too.
    names = [Label.of(label).what for label, _, _ in calls]
    probing, loading = "measuring memory bandwidth", "loading from storage"
    assert [name for name, _ in itertools.groupby(names)] == [probing, loading, "bench", probing]
    assert calls[-1][1:] == (1, 1)


def test_a_worker_that_fails_is_invalid_and_the_others_go_on(
    bundles: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tiny_bundle(bundles[0].parent / "broken")
    check = bench_run.read_peers

    def then_break(*given: object) -> object:
        peers = check(*given)
        (broken / "model.onnx").write_bytes(b"no longer a graph")
        return peers

    monkeypatch.setattr(bench_run, "read_peers", then_break)
    bad, good = measure([str(broken), str(bundles[1])], replace(ONE, repetitions=2)).measurements
    assert bad.stderr and bad.stderr[-1][:100] in bad.reasons[0]
    assert bad.status == INVALID and bad.samples == []
    assert "exit 1" in bad.reasons[0] and "does not match the hash" in bad.reasons[0] and "\n" not in bad.reasons[0]
    assert len(good.samples) == 2 and not good.stderr


def test_a_worker_that_hangs_meets_the_limit(bundles: list[Path]) -> None:
    (m,) = measure([str(bundles[0])], replace(ONE, timeout_s=0.01)).measurements
    assert m.status == INVALID and m.samples == [] and "no answer within 0.01 s" in m.reasons[0]


def test_schedule_is_balanced() -> None:
    assert [turn(2, n) for n in range(4)] == [[0, 1], [1, 0], [1, 0], [0, 1]]
    assert turn(1, 7) == [0]
    rounds = [turn(3, n) for n in range(6)]
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    assert {sum(order.index(spec) for order in rounds) for spec in range(3)} == {6}


def test_prompt_is_deterministic_and_in_the_vocabulary() -> None:
    tokens = random_tokens(500, 96, 7)
    assert tokens == random_tokens(500, 96, 7) != random_tokens(500, 96, 8)
    assert min(tokens) >= 0 and max(tokens) < 96


@pytest.mark.parametrize(
    ("specs", "options", "error", "message"),
    [
        ([], {}, PeerError, "nothing to measure"),
        (["{b}"], {"prompt": -1}, UserError, "--prompt -1"),
        (["{b}"], {"prompt": 0, "generate": 0}, UserError, "nothing to time"),
        (["{b}"], {"depth": (0, -2)}, UserError, "--depth 0,-2"),
        (["{b}"], {"precision": 2.0}, UserError, "--precision 2.0"),
        (["{b}"], {"max_time_s": 0.0}, UserError, "--max-time 0.0"),
        (["{b}"], {"warmup": -1}, UserError, "warmup -1 is not allowed"),
        (["{b}"], {"provider": "cuda"}, EngineError, "cuda"),
        (["{b}"], {"repetitions": 0}, UserError, "--repetitions 0"),
        (["{b}"], {"timeout_s": float("nan")}, UserError, "--time-limit nan"),
        (["{b}"], {"generate": CONTEXT}, EngineError, "tokens of context do not fit"),
        (["{b}"], {"threads": 0}, UserError, "--threads 0 is not allowed: give a number from 1"),
        (["{b}"], {"threads": 1024}, EngineError, "1024 threads"),
        (["{b}", "{b}"], {"names": ["a"]}, PeerError, "2 specs need as many different names"),
        (["{b}", "{b}"], {"names": ["a", "a"]}, PeerError, "different names"),
        (["/nowhere"], {}, BundleError, "not a bundle"),
    ],
)
def test_bad_input_is_one_line(
    bundles: list[Path], specs: list[str], options: dict[str, object], error: type[ValueError], message: str
) -> None:
    plan = replace(ONE, **{name: value for name, value in options.items() if name != "names"})
    with pytest.raises(error, match=message) as caught:
        measure([spec.format(b=bundles[0]) for spec in specs], plan, names=options.get("names"))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_torch_beside_a_bundle(bundles: list[Path], tiny_model: Callable[..., Path]) -> None:
    from safetensors.numpy import load_file

    directory = tiny_model()
    result = measure([str(bundles[0]), f"torch:{directory}"], replace(ONE, warmup=2))
    torch = result.measurements[1]
    assert torch.samples, torch.reasons
    assert (torch.name, torch.kind, torch.bundle_hash) == ("tiny (torch)", "torch", None)
    assert len(torch.samples[0].token_s) == 3 and "bundle_hash" in torch.unknown
    assert torch.model.parameters == sum(weight.size for weight in load_file(directory / "model.safetensors").values())
    # fp32, tied table read once by the head; rotary's inv_freq is a buffer of 8 floats, held twice.
    assert torch.model.weight_bytes_per_token == pytest.approx(4 * torch.model.parameters, abs=64)
    assert torch.model.kv_bytes_per_token == 3 * 2 * 3 * 16 * 4
    assert "torch" in result.versions


def test_slim_directory_in_torch(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Sizes differ per layer and the first layer has no attention, so plain transformers could not load it."""
    from safetensors.numpy import load_file
    from support.cuts import cut

    from export.engine.torch import open as open_torch
    from saap.prune.plan import LayerPlan, PrunePlan

    layers = LayerPlan((), (), tuple(range(32))), LayerPlan((0, 1), (0,), tuple(range(48)))
    slim = cut(tiny_model(num_hidden_layers=2), tmp_path / "slim", PrunePlan(layers))
    decoder = open_torch(slim, EngineOptions(1, 16))
    decoder.prefill(np.array([3, 1, 4]))
    model = decoder.facts()
    assert model.parameters == sum(weight.size for weight in load_file(slim / "model.safetensors").values())
    assert model.kv_bytes_per_token == 2 * 1 * 16 * 4


NOISY = """
import os
from export.engine.onnxruntime import OnnxRuntimeEngine
def open(source, options):
    print("noise"); os.system("echo noise")
    return OnnxRuntimeEngine(source, options)
"""


def test_what_libraries_print_is_not_taken_for_the_answer(bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    job = Repetition("noisy", str(bundles[0]), EngineOptions(1, 4), cpus=choose_cores(1), prompt=[1, 2], n_gen=2)
    done = subprocess.run(
        [sys.executable, "-m", "bench.measure.worker"],
        input=json.dumps(asdict(replace(job, warmup=0))),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines[-1]["sample"]["token_s"]) == 2
    assert done.stderr.count("noise") == 2
