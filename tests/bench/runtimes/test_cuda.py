"""GPU decoders on a fake GPU: real graphs that the CPU computes, with the GPU's rules for copies, waits and replays."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.edited import edited
from support.fake_gpu import CPU, CUDA, TENSORRT, Machine
from support.tiny_graphs import CONTEXT, VOCAB, tiny_bundle

from bench.measure.worker import timed_pass
from bench.runtimes.cuda import DeviceDecoder
from bench.runtimes.decoders import make_decoder, provider_facts
from bench.runtimes.providers import ProviderFacts
from export.bundle.decoder import OrtDecoder
from export.bundle.session import DecoderError

IDS = np.random.default_rng(3).integers(VOCAB, size=20)
KINDS = [("cuda", False), ("cuda", True), ("tensorrt", False)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[str], Path]:
    """The tiny bundle, under another target's name."""

    def make(target: str) -> Path:
        path = tiny_bundle(tmp_path / target)
        edited(path / "bundle.json", target=target)
        return path

    return make


def gpu_decoder(path: Path, provider: str, graph: bool = False, length: int = 32, machine: Machine | None = None):
    machine = machine or Machine(nodes={})
    return DeviceDecoder(path, 1, length, provider, cuda_graph=graph, runtime=machine), machine


@pytest.mark.parametrize(("provider", "graph"), KINDS[:2])
def test_cuda_computes_what_the_cpu_does(bundle, provider, graph) -> None:
    reference = OrtDecoder(bundle("cpu"), 1, 32)
    decoder, _ = gpu_decoder(bundle("cuda"), provider, graph)
    for prompt in (IDS[5:17], IDS[:7]):  # the second, shorter sequence replays what the first one captured
        reference.reset()
        decoder.reset()
        np.testing.assert_allclose(decoder.prefill(prompt), reference.prefill(prompt), atol=2e-5)
        np.testing.assert_allclose(decoder.prefill(IDS[:3]), reference.prefill(IDS[:3]), atol=2e-5)
        for token in (5, 17, 90, 2):
            np.testing.assert_allclose(decoder.step(token), reference.step(token), atol=2e-5)
        assert decoder.length == len(prompt) + 7


@pytest.mark.parametrize("writer", ["saap", "optimum"])
def test_a_portable_graph_does_not_see_the_position_that_tensorrt_needs(tiny_model, tmp_path, writer) -> None:
    if writer == "optimum":
        pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is an extra of its own")
    from support.exported import export_portable

    export_portable(tiny_model(), tmp_path / "bundle", graph_writer=writer)
    reference = OrtDecoder(tmp_path / "bundle", 1, 32)
    decoder, machine = gpu_decoder(tmp_path / "bundle", "tensorrt")
    for _ in range(2):
        reference.reset()
        decoder.reset()
        np.testing.assert_allclose(decoder.prefill(IDS[:9]), reference.prefill(IDS[:9]), atol=1e-4)
        np.testing.assert_allclose(decoder.prefill(IDS[9:12]), reference.prefill(IDS[9:12]), atol=1e-4)
        for token in (5, 17, 90):
            np.testing.assert_allclose(decoder.step(token), reference.step(token), atol=1e-4)
    # The bounds of the profile hold what was run, and the longest that may be.
    options = machine.sessions[0].asked[TENSORRT]
    bounds = [_shapes(options[f"trt_profile_{bound}_shapes"]) for bound in ("min", "opt", "max")]
    assert [b["input_ids"] for b in bounds] == [[1, 1], [1, 1], [1, 32]]
    assert [b["past_key_values.0.key"] for b in bounds] == [[1, 3, 1, 16], [1, 3, 17, 16], [1, 3, 32, 16]]
    assert [b["attention_mask"] for b in bounds] == [[1, 2], [1, 18], [1, 64]]
    assert set(bounds[0]) == {given.name for given in machine.sessions[0].get_inputs()}
    assert list(machine.sessions[0].asked) == [TENSORRT, CUDA]
    assert Path(options["trt_engine_cache_path"]).is_dir()
    assert options["trt_fp16_enable"] == options["trt_engine_cache_enable"] == "True"


def _shapes(text: str) -> dict[str, list[int]]:
    return {name: [int(n) for n in shape.split("x")] for name, shape in re.findall(r"([^:,]+):([^,]+)", text)}


def test_a_real_cuda_bundle_keeps_its_cache_in_float16_on_the_device(tiny_model, tmp_path) -> None:
    from support.exported import export_bundle

    manifest = export_bundle(tiny_model(), tmp_path / "bundle", target="cuda", bits=4)
    decoder, machine = gpu_decoder(tmp_path / "bundle", "cuda", length=24)
    cache = [memory for memory in machine.memory if memory.array.ndim == 4]
    assert len(cache) == 2 * len(manifest.kv_layers) == 6
    assert {memory.device_name() for memory in machine.memory} == {"cuda"}
    assert {(memory.array.dtype.name, memory.array.shape) for memory in cache} == {("float16", (1, 3, 24, 16))}
    stepped = timed_pass(decoder, IDS, 3, iter(range(99)).__next__).tokens
    other, _ = gpu_decoder(tmp_path / "bundle", "cuda", graph=True, length=24)
    assert timed_pass(other, IDS, 3, iter(range(99)).__next__).tokens == stepped
    assert all(np.abs(memory.array[0, 0, :23].astype(np.float32)).sum(axis=-1).all() for memory in cache)
    assert not any(memory.array[0, 0, 23:].any() for memory in cache)


def test_past_and_present_are_one_buffer(bundle) -> None:
    decoder, machine = gpu_decoder(bundle("cuda"), "cuda")
    decoder.prefill(IDS)
    before = len(machine.memory)
    for _ in range(3):
        decoder.step(1)
    assert len(machine.memory) == before  # a step allocates nothing
    bound = decoder._binding
    for name in ("0.key", "0.value", "1.key", "1.value"):
        assert bound.inputs[f"past_key_values.{name}"] is bound.outputs[f"present.{name}"]


@pytest.mark.parametrize(("provider", "graph"), KINDS)
def test_the_gpu_is_waited_for_before_the_clock_is_read(bundle, provider, graph) -> None:
    path = bundle("cuda") if provider == "cuda" else bundle("portable")
    decoder, machine = gpu_decoder(path, provider, graph)
    log = machine.log

    def clock() -> float:
        log.append("clock")
        return float(len(log))

    timed_pass(decoder, IDS[:4], 3, clock)
    work = "run wait read clock"
    assert " ".join(log) == f"clock {work} clock {work} {work} {work}"


def test_only_steps_are_captured_and_the_provider_is_asked_for_it(bundle) -> None:
    decoder, machine = gpu_decoder(bundle("cuda"), "cuda", graph=True)
    (session,) = machine.sessions
    assert session.asked == {CUDA: {"device_id": "0", "enable_cuda_graph": "1"}}
    decoder.prefill(IDS[:4])
    assert session.captured == {}
    decoder.step(1)
    inputs = session.captured["1"][0]
    assert inputs["attention_mask"].array.shape == (1, 32) and inputs["attention_mask"].array.sum() == 5
    decoder.prefill(IDS[:4])
    decoder.step(1)
    assert list(session.captured) == ["1"] and inputs["attention_mask"].array.sum() == 10
    _, machine = gpu_decoder(bundle("cuda"), "cuda")
    assert machine.sessions[0].asked == {CUDA: {"device_id": "0"}}


def test_full_cache_and_empty_prompt_are_refused(bundle) -> None:
    decoder, _ = gpu_decoder(bundle("cuda"), "cuda", length=4)
    decoder.prefill(IDS[:4])
    with pytest.raises(DecoderError, match="holds 4 positions and 5 are needed"):
        decoder.step(1)
    with pytest.raises(DecoderError, match="an empty prompt"):
        decoder.prefill(IDS[:0])
    with pytest.raises(DecoderError, match=f"1 to {CONTEXT}"):
        gpu_decoder(bundle("cuda"), "cuda", length=CONTEXT + 1)


def test_what_the_gpu_refuses_is_one_line(bundle, monkeypatch) -> None:
    path, machine = bundle("cuda"), Machine(nodes={})

    def refuse(text: str) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise RuntimeError(text + "\nat line 3")

        return fail

    decoder, _ = gpu_decoder(path, "cuda", machine=machine)
    monkeypatch.setattr(machine.sessions[0], "run_with_iobinding", refuse("CUDA failure 209: no kernel image"))
    with pytest.raises(
        DecoderError, match=r"provider cuda failed: CUDA failure 209: no kernel image; .*Jetson"
    ) as caught:
        decoder.prefill(IDS[:3])
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(machine, "put", refuse("CUDA failure 2: out of memory"))
    with pytest.raises(DecoderError, match=r"cache of 32 positions cannot be made on the GPU \(.*out of memory\)"):
        gpu_decoder(path, "cuda", machine=machine)


@pytest.mark.parametrize(
    ("provider", "target", "options", "message"),
    [
        ("cpu", "cpu", {"cuda_graph": True}, "provider cpu cannot replay a CUDA graph"),
        ("tensorrt", "portable", {"cuda_graph": True}, "provider tensorrt cannot replay a CUDA graph"),
        ("cuda", "cpu", {}, "bundle for cpu, which the provider cuda does not run"),
        ("tensorrt", "cuda", {}, "bundle for cuda, which the provider tensorrt does not run"),
    ],
)
def test_what_does_not_fit_is_refused(bundle, provider, target, options, message) -> None:
    with pytest.raises(DecoderError, match=message) as caught:
        make_decoder(bundle(target), 1, 16, provider, **options)
    assert "\n" not in str(caught.value)


def test_the_cpu_has_its_own_decoder_and_a_gpu_another(bundle, monkeypatch) -> None:
    decoder = make_decoder(bundle("cpu"), 1, 16)
    assert type(decoder) is OrtDecoder and decoder.prefill(IDS[:3]).shape == (VOCAB,)
    facts = provider_facts(decoder)
    assert facts == ProviderFacts("cpu", "cpu", None, ()) and not facts.fallback
    machine = Machine(nodes={}, available=(CUDA, CPU))
    monkeypatch.setattr("bench.runtimes.cuda.gpu_runtime", lambda: machine)
    assert type(make_decoder(bundle("cuda"), 1, 16, "cuda")) is DeviceDecoder
