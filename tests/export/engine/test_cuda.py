"""GPU decoders on a fake GPU: real graphs that the CPU computes, with the GPU's rules for copies, waits and replays."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from support.edited import edited
from support.fake_gpu import CPU, CUDA, Machine
from support.tiny_graphs import CONTEXT, VOCAB, tiny_bundle

from bench.measure.worker import timed_pass
from export.bundle.manifest import BundleError, read_manifest
from export.engine import onnxruntime as module
from export.engine.cuda import CudaEngine
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineError, EngineOptions
from export.engine.session import check_provider

IDS = np.random.default_rng(3).integers(VOCAB, size=20)


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[str], Path]:
    """Rewrite the tiny bundle under another target's name."""

    def make(target: str) -> Path:
        path = tiny_bundle(tmp_path / target)
        edited(path / "bundle.json", target=target)
        return path

    return make


def gpu_decoder(path: Path, length: int = 32, machine: Machine | None = None) -> tuple[CudaEngine, Machine]:
    machine = machine or Machine()
    return CudaEngine(path, EngineOptions(1, length), machine), machine


def test_cuda_computes_what_the_cpu_does(bundle) -> None:
    reference = OnnxRuntimeEngine(bundle("cpu"), EngineOptions(1, 32))
    decoder, _ = gpu_decoder(bundle("cuda"))
    for prompt in (IDS[5:17], IDS[:7]):
        reference.rewind(0)
        decoder.rewind(0)
        np.testing.assert_allclose(decoder.prefill(prompt), reference.prefill(prompt), atol=2e-5)
        np.testing.assert_allclose(decoder.prefill(IDS[:3]), reference.prefill(IDS[:3]), atol=2e-5)
        for token in (5, 17, 90, 2):
            np.testing.assert_allclose(decoder.step(token), reference.step(token), atol=2e-5)
        assert decoder.length == len(prompt) + 7


def test_a_real_cuda_bundle_keeps_its_cache_in_float16_on_the_device(tiny_model, tmp_path) -> None:
    from support.exported import export_bundle

    manifest = export_bundle(tiny_model(), tmp_path / "bundle", target="cuda", bits=4)
    decoder, machine = gpu_decoder(tmp_path / "bundle", length=24)
    cache = [memory for memory in machine.memory if memory.array.ndim == 4]
    assert len(cache) == 2 * len(manifest.kv_layers) == 6
    assert {memory.device_name() for memory in machine.memory} == {"cuda"}
    assert {(memory.array.dtype.name, memory.array.shape) for memory in cache} == {("float16", (1, 3, 24, 16))}
    timed_pass(decoder, IDS, 3, iter(range(99)).__next__)
    assert all(np.abs(memory.array[0, 0, :23].astype(np.float32)).sum(axis=-1).all() for memory in cache)
    assert not any(memory.array[0, 0, 23:].any() for memory in cache)


def test_past_and_present_are_one_buffer(bundle) -> None:
    decoder, machine = gpu_decoder(bundle("cuda"))
    decoder.prefill(IDS)
    before = len(machine.memory)
    for _ in range(3):
        decoder.step(1)
    assert len(machine.memory) == before  # a step allocates nothing
    bound = decoder._binding
    for name in ("0.key", "0.value", "1.key", "1.value"):
        assert bound.inputs[f"past_key_values.{name}"] is bound.outputs[f"present.{name}"]


def test_the_gpu_is_waited_for_before_the_clock_is_read(bundle) -> None:
    decoder, machine = gpu_decoder(bundle("cuda"))
    log = machine.log

    def clock() -> float:
        log.append("clock")
        return float(len(log))

    timed_pass(decoder, IDS[:4], 3, clock)
    work = "run wait read clock"
    assert " ".join(log) == f"clock {work} clock {work} {work} {work}"


def test_full_cache_and_empty_prompt_are_refused(bundle) -> None:
    decoder, _ = gpu_decoder(bundle("cuda"), length=4)
    decoder.prefill(IDS[:4])
    with pytest.raises(EngineError, match="holds 4 positions and 5 are needed"):
        decoder.step(1)
    with pytest.raises(EngineError, match="an empty prompt"):
        decoder.prefill(IDS[:0])
    with pytest.raises(EngineError, match=f"1 to {CONTEXT}"):
        gpu_decoder(bundle("cuda"), length=CONTEXT + 1)


def test_what_the_gpu_refuses_is_one_line(bundle, monkeypatch) -> None:
    path, machine = bundle("cuda"), Machine()

    def refuse(text: str) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise RuntimeError(text + "\nat line 3")

        return fail

    decoder, _ = gpu_decoder(path, machine=machine)
    monkeypatch.setattr(machine.sessions[0], "run_with_iobinding", refuse("CUDA failure 209: no kernel image"))
    with pytest.raises(
        EngineError, match=r"provider cuda failed: CUDA failure 209: no kernel image; .*Jetson"
    ) as caught:
        decoder.prefill(IDS[:3])
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(machine, "put", refuse("CUDA failure 2: out of memory"))
    with pytest.raises(EngineError, match=r"cache of 32 positions cannot be made on the GPU \(.*out of memory\)"):
        gpu_decoder(path, machine=machine)


def test_a_bundle_for_the_cpu_is_refused(bundle) -> None:
    with pytest.raises(EngineError, match="bundle for cpu, which the provider cuda does not run") as caught:
        module.open(bundle("cpu"), EngineOptions(1, 16, provider="cuda"))
    assert "\n" not in str(caught.value)


def test_the_cpu_has_its_own_decoder_and_a_gpu_another(bundle, monkeypatch) -> None:
    decoder = module.open(bundle("cpu"), EngineOptions(1, 16))
    assert type(decoder) is OnnxRuntimeEngine and decoder.prefill(IDS[:3]).shape == (VOCAB,)
    monkeypatch.setattr("export.engine.cuda.gpu_runtime", Machine)
    assert type(module.open(bundle("cuda"), EngineOptions(1, 16, provider="cuda"))) is CudaEngine


def test_a_session_without_its_provider_is_refused(bundle) -> None:
    with pytest.raises(EngineError, match=rf"could not start {CUDA} and would run .* on {CPU}") as caught:
        gpu_decoder(bundle("cuda"), machine=Machine(starts=False))
    assert "\n" not in str(caught.value)
    broken = Machine(fails={CUDA: "out of memory\nat line 3"})
    with pytest.raises(EngineError, match=rf"1\.99\.0 cannot run .*model\.onnx on {CUDA}: out of memory$"):
        gpu_decoder(bundle("cuda"), machine=broken)


def test_a_provider_that_is_not_installed_is_refused_before_anything_is_loaded(bundle) -> None:
    manifest = read_manifest(bundle("cuda"))
    with pytest.raises(EngineError, match=rf"needs {CUDA}, .* has only {CPU}: .*onnxruntime-gpu.*Jetson") as caught:
        check_provider(manifest, "cuda", "B", runtime=Machine(available=(CPU,)))
    assert "\n" not in str(caught.value)
    check_provider(manifest, "cuda", "B", runtime=Machine(available=(CUDA, CPU)))
    if CUDA not in ort.get_available_providers():  # the real one
        with pytest.raises(EngineError, match=f"this ONNX Runtime {ort.__version__} has only"):
            check_provider(manifest, "cuda", "B")
    with pytest.raises(EngineError, match="no provider 'rocm': give cpu, cuda"):
        check_provider(manifest, "rocm", "B")


def test_weights_outside_the_folder_are_refused_before_a_session_is_made(bundle, tmp_path) -> None:
    path, machine = bundle("cuda"), Machine()
    (path / "model.onnx.data").rename(tmp_path / "data")
    (path / "model.onnx.data").symlink_to(tmp_path / "data")
    with pytest.raises(BundleError, match="outside the bundle"):
        CudaEngine(path, EngineOptions(1, 16), machine)
    assert machine.sessions == []
