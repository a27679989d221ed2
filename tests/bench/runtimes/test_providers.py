"""Fallbacks of ONNX Runtime: real ones on the CPU (Azure's provider computes nothing here), others on a fake GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from support.edited import edited
from support.fake_gpu import CPU, CUDA, TENSORRT, Machine
from support.tiny_graphs import tiny_bundle

from bench.runtimes.cuda import DeviceDecoder
from bench.runtimes.decoders import provider_facts
from bench.runtimes.providers import GpuSession, placed_by_profile
from export.bundle.manifest import BundleError, read_manifest
from export.bundle.session import DecoderError, check_provider

AZURE = "AzureExecutionProvider"
SHAPES = ["Shape", "Gather", "Cast"]
COMPUTED = ["MatMul", "GroupQueryAttention", "LayerNormalization", "Relu"]
needs_azure = pytest.mark.skipif(AZURE not in ort.get_available_providers(), reason=f"this ONNX Runtime has no {AZURE}")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tiny_bundle(tmp_path / "bundle")
    edited(path / "bundle.json", target="cuda")
    return path


def run_once(gpu: GpuSession) -> None:
    feed = {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.ones((1, 3), np.int64)}
    caches = [i for i in gpu.session.get_inputs() if i.name.startswith("past")]
    gpu.session.run(None, {**feed, **{i.name: np.zeros((1, i.shape[1], 0, 16), np.float32) for i in caches}})


@needs_azure
@pytest.mark.parametrize("older", [False, True])
def test_a_real_silent_fallback_is_found(bundle, older) -> None:
    """The provider is in the session and first, and every node runs on the CPU."""
    runtime = ort
    if older:  # whose sessions do not tell where their nodes are, so that the profile must
        session = lambda *args, **kwargs: ort.InferenceSession(*args, **kwargs)  # noqa: E731
        names = ("SessionOptions", "ExecutionMode", "__version__")
        runtime = SimpleNamespace(InferenceSession=session, **{name: getattr(ort, name) for name in names})
    gpu = GpuSession(bundle / "model.onnx", 1, [(AZURE, {})], runtime)
    run_once(gpu)
    facts = gpu.facts(AZURE)
    assert facts.active == AZURE and facts.fallback
    assert set(facts.on_cpu) == set(COMPUTED)
    assert facts.nodes == {"cpu": 35}


def test_a_session_without_its_provider_is_refused(bundle) -> None:
    with pytest.raises(DecoderError, match=rf"could not start {CUDA} and would run .* on {CPU}") as caught:
        DeviceDecoder(bundle, 1, 16, "cuda", runtime=Machine(nodes={}, starts=False))
    assert "\n" not in str(caught.value)
    broken = Machine(nodes={}, fails={CUDA: "out of memory\nat line 3"})
    with pytest.raises(DecoderError, match=rf"1\.99\.0 cannot run .*model\.onnx on {CUDA}: out of memory$"):
        DeviceDecoder(bundle, 1, 16, "cuda", runtime=broken)


@pytest.mark.parametrize(
    ("provider", "nodes", "counted", "on_cpu", "fallback"),
    [
        ("cuda", {CUDA: ["MatMulNBits"] * 2, CPU: SHAPES}, {"cuda": 2, "cpu": 3}, (), False),
        ("cuda", {CUDA: ["Relu"], CPU: [*SHAPES, "MatMulNBits"]}, {"cuda": 1, "cpu": 4}, ("MatMulNBits",), True),
        ("cuda", {CPU: SHAPES}, {"cpu": 3}, (), True),
        ("tensorrt", {TENSORRT: ["MatMul"] * 8, CUDA: ["Range"]}, {"tensorrt": 8, "cuda": 1}, (), False),
        ("tensorrt", {TENSORRT: ["MatMul"] * 8, CPU: ["Xor"]}, {"tensorrt": 8, "cpu": 1}, ("Xor",), True),
        ("tensorrt", {CUDA: ["MatMul"] * 9}, {"cuda": 9}, (), True),  # TensorRT took nothing
    ],
)
def test_shapes_on_the_cpu_are_no_fallback_and_matrices_are(
    bundle, monkeypatch, tmp_path, provider, nodes, counted, on_cpu, fallback
) -> None:
    """TensorRT may leave nodes to CUDA, but not all."""
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))
    edited(bundle / "bundle.json", target="cuda" if provider == "cuda" else "portable")
    decoder = DeviceDecoder(bundle, 1, 16, provider, runtime=Machine(nodes))
    decoder.prefill(np.arange(4))
    for _ in range(2):  # asked again, it says the same
        facts = provider_facts(decoder)
        assert (facts.asked, facts.active, facts.nodes) == (provider, provider, counted)
        assert (facts.on_cpu, facts.fallback) == (on_cpu, fallback)


def test_an_older_runtime_is_profiled_until_the_first_sequence_ends(bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "profiles"))
    (tmp_path / "profiles").mkdir()
    machine = Machine()
    decoder = DeviceDecoder(bundle, 1, 16, "cuda", runtime=machine)
    decoder.reset()
    decoder.prefill(np.arange(4))
    decoder.step(3)
    assert "profile ends" not in machine.log
    for _ in range(2):
        decoder.reset()
        decoder.prefill(np.arange(4))
    assert machine.log.count("profile ends") == 1
    facts = provider_facts(decoder)  # the fake computed on the CPU, and the profile says so
    assert facts.fallback and set(facts.on_cpu) == set(COMPUTED) and facts.nodes == {"cpu": 35}
    assert not list((tmp_path / "profiles").iterdir())


def test_a_profile_counts_nodes_not_runs() -> None:
    def event(name: str, operator: str, provider: str) -> dict[str, object]:
        return {"cat": "Node", "name": name, "args": {"provider": provider, "op_name": operator}}

    events = [event("a_kernel_time", "MatMul", CUDA), event("b_kernel_time", "MatMul", CUDA)] * 3
    other = [{"cat": "Session", "name": "model_run"}, {"cat": "Node", "name": "a_fence_before", "args": {}}]
    other.append({**event("ampere_gemm", "MatMul", CUDA), "cat": "Kernel"})  # of a build that traces the GPU
    expected = {CUDA: Counter(MatMul=2), CPU: Counter(Shape=1)}
    assert placed_by_profile([*events, *other, event("c_kernel_time", "Shape", CPU)]) == expected


def test_a_provider_that_is_not_installed_is_refused_before_anything_is_loaded(bundle) -> None:
    with pytest.raises(DecoderError, match=rf"needs {CUDA}, .* has only {CPU}: .*onnxruntime-gpu.*Jetson") as caught:
        check_provider(read_manifest(bundle), "cuda", "B", runtime=Machine(available=(CPU,)))
    assert "\n" not in str(caught.value)
    check_provider(read_manifest(bundle), "cuda", "B", runtime=Machine(available=(CUDA, CPU)), cuda_graph=True)
    if CUDA not in ort.get_available_providers():  # the real one
        with pytest.raises(DecoderError, match=f"this ONNX Runtime {ort.__version__} has only"):
            check_provider(read_manifest(bundle), "cuda", "B")
    with pytest.raises(DecoderError, match="no provider 'rocm': give cpu, cuda, tensorrt"):
        check_provider(read_manifest(bundle), "rocm", "B")


def test_weights_outside_the_folder_are_refused_before_a_session_is_made(bundle, tmp_path) -> None:
    (bundle / "model.onnx.data").rename(tmp_path / "data")
    (bundle / "model.onnx.data").symlink_to(tmp_path / "data")
    machine = Machine(nodes={})
    with pytest.raises(BundleError, match="outside the bundle's folder"):
        GpuSession(bundle / "model.onnx", 1, [(CUDA, {})], machine)
    assert machine.sessions == []
