from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_graphs import CONTEXT, VOCAB, tiny_bundle

from bench.child import call
from bench.measure import run as bench_run
from bench.measure.cores import choose_cores
from bench.measure.options import BenchOptions, OptionsError
from bench.measure.result import INVALID, Result, read_result, write_result
from bench.measure.rounds import prompt_tokens, turn
from bench.measure.run import measure
from bench.measure.worker import timed_pass
from bench.runtimes.peers import PeerError, read_peers
from export.bundle.decoder import DecoderError, OrtDecoder
from export.bundle.manifest import BundleError
from export.generate.scoring import BundleScorer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bundles")
    return [tiny_bundle(root / "dense"), tiny_bundle(root / "slim", seed=1)]


@pytest.fixture(scope="module")
def two(bundles: list[Path]) -> tuple[Result, list[tuple[str, float, float]]]:
    calls: list[tuple[str, float, float]] = []
    result = measure(
        [str(b) for b in bundles],
        BenchOptions(prompt=12, generate=10, threads=1, repetitions=2, warmup=3, cold=False),
        progress=lambda *call: calls.append(call),
    )
    return result, calls


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
    assert dense.bundle_hash != slim.bundle_hash
    assert result.device["fingerprint"] and result.versions["onnxruntime"]
    assert len(result.bandwidth[0].samples) == 10
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result


def test_what_a_repetition_holds(two: tuple[Result, object]) -> None:
    for s in (s for m in two[0].measurements for s in m.samples):
        assert s.startup_s is not None and 0 < s.startup_s < 30
        assert s.base_bytes is not None and 20e6 < s.base_bytes <= s.peak_load_bytes
        assert s.pss_bytes is not None and s.pss_bytes <= s.anonymous_bytes + s.file_bytes
        assert s.available_drop_bytes is not None
        assert s.counters["clock_limit"] >= 0.03 and s.counters["clock_s"] > 0
        power, why = two[0].settings["power"], s.unknown.get("energy", "")
        assert s.energy.source == power["source"] if s.energy else "power" in why or [why] == power["reasons"]


def test_a_sweep_has_one_measurement_per_spec_and_setting(bundles: list[Path]) -> None:
    plan = BenchOptions(
        prompt=(4, 0), generate=3, depth=(0, 5), threads=1, pairs=[(7, 0)], repetitions=1, warmup=0, cold=False
    )
    result = measure([str(b) for b in bundles], plan)
    assert [m.test for m in result.of("dense")] == ["tg3", "pp4+tg3", "pp7", "tg3@d5", "pp4+tg3@d5", "pp7@d5"]
    assert len({m.key for m in result.measurements}) == 12
    for m in result.measurements:
        (s,) = m.samples
        assert (s.prefill_s is None) == (m.n_prompt == 0) and len(s.token_s) == m.n_gen
    with pytest.raises(DecoderError, match="do not fit"):
        measure([str(bundles[0])], replace(plan, depth=CONTEXT - 5))


def test_repetitions_end_when_the_ratio_is_known_or_time_is_up(bundles: list[Path]) -> None:
    plan = BenchOptions(prompt=4, generate=3, threads=1, warmup=0, cold=False, precision=0.99, max_time_s=60)
    loose = measure([str(b) for b in bundles], plan)
    assert {len(m.samples) for m in loose.measurements} == {10}
    hurried = measure([str(bundles[0])], replace(plan, precision=1e-9, max_time_s=0.01))
    assert len(hurried.measurements[0].samples) == 6


def test_cold_load_reads_the_files_again(bundles: list[Path]) -> None:
    (m,) = measure(
        [str(bundles[0])], BenchOptions(prompt=2, generate=2, threads=1, repetitions=1, warmup=0)
    ).measurements
    # A file system in memory has no cache to drop.
    assert (m.cold_load_s is not None and m.cold_load_s > 0) or "were read" in m.unknown["cold_load_s"]


def test_too_little_memory_is_refused_with_the_sum(bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100000 kB\nMemAvailable: 40000 kB\n")
    with pytest.raises(PeerError, match=r"needs about \d+ MB \(weights \d+ \+ runtime 67 \+ cache \d+\) and 41 MB"):
        measure([str(bundles[0])], BenchOptions(threads=1, prompt=8, generate=8, root=tmp_path))


def test_progress_counts_repetitions(two: tuple[Result, list[tuple[str, float, float]]]) -> None:
    _, calls = two
    rounds = [(label, done) for label, done, _ in calls if ": round" in label or label == "bench"]
    assert [done for label, done in rounds if "," not in label.split(":")[-1]] == [0, 1, 2, 3, 4]
    assert ("bench, slim: round 1", 1, 4.0) in calls and calls[-1] == ("bench", 4, 4)
    assert any("warm-up" in label for label, _, _ in calls)


def test_the_worker_adds_little_memory(two: tuple[Result, object]) -> None:
    peak = two[0].measurements[0].peak("peak_decode_bytes")
    assert peak is not None and peak < 120e6  # numpy and ONNX Runtime; a stray import of torch would show


def test_a_worker_that_fails_is_invalid_and_the_others_go_on(
    bundles: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = bundles[0].parent / "broken"
    tiny_bundle(broken)
    check = bench_run.read_peers

    def then_break(*given: object) -> object:
        peers = check(*given)
        (broken / "model.onnx").write_bytes(b"no longer a graph")
        return peers

    monkeypatch.setattr(bench_run, "read_peers", then_break)
    plan = BenchOptions(prompt=4, generate=3, threads=1, precision=0.99, warmup=0, cold=False)  # as many as it takes
    bad, good = measure([str(broken), str(bundles[1])], plan).measurements
    assert bad.stderr and bad.stderr[-1][:100] in bad.reasons[0]
    assert bad.status == INVALID and bad.samples == []
    assert "exit 1" in bad.reasons[0] and "not an ONNX file" in bad.reasons[0] and "\n" not in bad.reasons[0]
    assert len(good.samples) == 10 and good.status != INVALID


def test_a_worker_that_hangs_meets_the_limit(bundles: list[Path]) -> None:
    result = measure(
        [str(bundles[0])], BenchOptions(prompt=4, generate=3, threads=1, repetitions=2, timeout_s=0.01, cold=False)
    )
    (m,) = result.measurements
    assert m.status == INVALID and m.samples == [] and "no answer within 0.01 s" in m.reasons[0]


def test_measured_tokens_are_the_model_s_own(bundles: list[Path]) -> None:
    decoder = OrtDecoder(bundles[0], 1, 22, verify=False)
    ticks = iter(range(100))
    done = timed_pass(decoder, np.array(prompt_tokens(12, VOCAB, 0)), 10, lambda: float(next(ticks)))
    whole = BundleScorer(bundles[0], 1).logits(np.array([[*prompt_tokens(12, VOCAB, 0), *done.tokens[:-1]]]))[0]
    assert whole[11:].argmax(-1).tolist() == done.tokens


def test_schedule_is_balanced() -> None:
    assert [turn(2, n) for n in range(4)] == [[0, 1], [1, 0], [1, 0], [0, 1]]
    assert turn(1, 7) == [0]
    rounds = [turn(3, n) for n in range(6)]
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    assert {sum(order.index(spec) for order in rounds) for spec in range(3)} == {6}


def test_prompt_is_deterministic_and_in_the_vocabulary() -> None:
    tokens = prompt_tokens(500, 96, 7)
    assert tokens == prompt_tokens(500, 96, 7) != prompt_tokens(500, 96, 8)
    assert min(tokens) >= 0 and max(tokens) < 96


@pytest.mark.parametrize(
    ("specs", "options", "error", "message"),
    [
        ([], {}, PeerError, "nothing to measure"),
        (["{b}"], {"prompt": -1}, OptionsError, "--prompt -1"),
        (["{b}"], {"prompt": 0, "generate": 0}, OptionsError, "nothing to time"),
        (["{b}"], {"depth": (0, -2)}, OptionsError, "--depth -2"),
        (["{b}"], {"pairs": [(4, -1)]}, OptionsError, "-pg takes"),
        (["{b}"], {"precision": 2.0}, OptionsError, "--precision 2.0"),
        (["{b}"], {"max_time_s": 0.0}, OptionsError, "time limit"),
        (["{b}"], {"warmup": -1}, OptionsError, "-1 warm-up steps"),
        (["{b}"], {"provider": "cuda"}, DecoderError, "cuda"),
        (["{b}"], {"repetitions": 0}, OptionsError, "--repetitions 0"),
        (["{b}"], {"timeout_s": float("nan")}, OptionsError, "time limit"),
        (["{b}"], {"generate": CONTEXT}, DecoderError, "tokens of context do not fit"),
        (["{b}"], {"threads": 0}, DecoderError, "0 threads"),
        (["{b}"], {"threads": 10_000}, DecoderError, "10000 threads"),
        (["{b}", "{b}"], {"names": ["a"]}, PeerError, "2 specs need as many different names"),
        (["{b}", "{b}"], {"names": ["a", "a"]}, PeerError, "different names"),
        (["/nowhere"], {}, BundleError, "not a bundle"),
        (["mlx:/nowhere"], {}, PeerError, "no runtime 'mlx'"),
        (["torch:/nowhere"], {}, PeerError, "no config.json"),
    ],
)
def test_bad_input_is_one_line(
    bundles: list[Path], specs: list[str], options: dict[str, object], error: type[ValueError], message: str
) -> None:
    given = {key: value for key, value in options.items() if key != "names"}
    names = options.get("names")
    with pytest.raises(error, match=message) as caught:
        measure(
            [spec.format(b=bundles[0]) for spec in specs],
            BenchOptions(**{"threads": 1, "prompt": 8, "generate": 8, **given}),
            names=names,
        )
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_same_directory_twice_gets_two_names(bundles: list[Path]) -> None:
    assert [p.name for p in read_peers([str(bundles[0])] * 3, 8)] == ["dense", "dense #2", "dense #3"]


def test_torch_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8}))
    monkeypatch.setattr("bench.runtimes.peers.find_spec", lambda name: None)
    with pytest.raises(PeerError, match=r"pip install 'saap\[prune\]'"):
        read_peers([f"torch:{tmp_path}"], 8)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"vocab_size": null}'])
def test_damaged_torch_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PeerError, match="damaged"):
        read_peers([f"torch:{tmp_path}"], 8)


def test_torch_beside_a_bundle(bundles: list[Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "tiny")
    result = measure(
        [str(bundles[0]), f"torch:{tmp_path / 'tiny'}"],
        BenchOptions(prompt=6, generate=5, threads=1, repetitions=1, warmup=2, cold=False),
    )
    torch = result.measurements[1]
    # One repetition of milliseconds: what its machine's clock did meanwhile says nothing of torch.
    others = [reason for reason in torch.reasons if "clock moved" not in reason]
    assert others == [] or torch.status != INVALID, others
    assert (torch.name, torch.kind, torch.bundle_hash) == ("tiny (torch)", "torch", None)
    assert len(torch.samples[0].token_s) == 5 and "bundle_hash" in torch.unknown
    assert torch.model.parameters == sum(p.numel() for p in model.parameters())
    # fp32, tied table read once by the head; rotary's inv_freq is a buffer of 4 floats, held twice.
    assert torch.model.weight_bytes_per_token == pytest.approx(4 * torch.model.parameters, abs=64)
    assert torch.model.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert "torch" in result.versions


def test_torch_worker_decodes_like_generate(tmp_path: Path) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from bench.runtimes.torch import TorchDecoder

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ticks = iter(range(100))
    prompt = np.array([3, 1, 4, 1, 5])
    done = timed_pass(TorchDecoder(model, tmp_path, 32), prompt, 7, lambda: float(next(ticks)))
    expected = model.generate(
        torch.from_numpy(prompt)[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert done.tokens == expected[0, 5:].tolist()


def test_a_worker_is_told_that_weights_are_packed(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SAAP_CACHE", raising=False)
    options = BenchOptions(prompt=4, generate=3, threads=1, repetitions=1, warmup=0, cold=False)
    jobs: list[Any] = []

    def counted(module: str, job: dict[str, Any], *rest: Any, **named: Any) -> dict[str, Any]:
        jobs.append(job)
        return call(module, job, *rest, **named)

    monkeypatch.setattr("bench.measure.rounds.call", counted)
    result = measure([str(bundles[0]), f"prepacked:{bundles[0]}"], options)
    assert [m.name for m in result.measurements if m.samples] == ["dense", "dense (prepacked)"]
    assert [job["prepacked"] for job in jobs] == [False, True]
    assert list((tmp_path / "saap/prepacked").glob("*/model.onnx"))


def test_what_libraries_print_is_not_taken_for_the_answer(bundles: list[Path]) -> None:
    job = {"path": str(bundles[0]), "prompt": [1, 2], "n_gen": 2, "warmup": 0, "threads": 1, "order": 0}
    code = """
import os, bench.measure.worker as w
def load(job):
    print("noise"); os.system("echo noise")
    return w.load_bundle(job)
w.main(lambda job: (load, w.bundle_facts))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps({**job, "cpus": choose_cores(1)}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout.splitlines()[-1])["sample"]["token_s"]) == 2
    assert "noise" in done.stderr


def test_bench_imports_no_torch() -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / "bench").rglob("*.py") if path.stem != "__init__"]
    modules = [".".join(file.with_suffix("").parts) for file in files]
    assert {"bench.measure.run", "bench.runtimes.torch", "bench.judge.comparison"} <= set(modules)
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += "print([m for m in ('torch', 'transformers', 'saap', 'scipy', 'onnxruntime') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_slim_directory_in_torch(tmp_path: Path) -> None:
    """Sizes differ per layer and the first layer has no attention, so plain transformers could not load it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    checkpoint = pytest.importorskip("saap.models.checkpoint")
    from saap.models.shape import LayerSizes, ModelShape

    layers = (LayerSizes(0, 0, 32), LayerSizes(2, 1, 48))
    dense = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    shape = ModelShape(hidden=32, head_dim=8, vocab=64, tied=True, layers=layers)
    classes = checkpoint.slim_classes("Llama")
    config = checkpoint.slim_config({**dense.to_dict(), "architectures": ["LlamaForCausalLM"]}, shape)
    torch.manual_seed(0)
    model = classes.model(classes.config.from_dict(config))
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    (tmp_path / "base").mkdir()
    slim = checkpoint.write_slim(tmp_path / "slim", tmp_path / "base", config, iter(tensors.items()), {})
    (m,) = measure(
        [f"torch:{slim}"], BenchOptions(prompt=6, generate=4, threads=1, repetitions=1, warmup=0, cold=False)
    ).measurements
    assert len(m.samples) == 1, m.reasons
    assert m.model.parameters == sum(t.numel() for t in tensors.values())
    assert m.model.kv_bytes_per_token == 2 * 1 * 8 * 4
