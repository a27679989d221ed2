import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.fake_trees import plant
from support.tiny_graphs import CONTEXT, HIDDEN, VOCAB, tiny_bundle

from bench.measure.bursts import take_bursts
from bench.measure.options import BenchOptions
from bench.measure.result import INVALID, Bursts
from bench.measure.run import measure
from bench.measure.worker import timed_pass
from bench.runtimes.peers import read_peers
from export.bundle.genai import genai_config
from export.bundle.manifest import DECODE_GRAPH, BundleManifest, read_manifest, write_manifest
from export.engine import turns
from export.engine.facts import file_facts
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.opening import logits_in_process
from export.engine.protocol import EngineOptions
from export.engine.turns import random_tokens
from export.engine.worker import warm_up
from saap.base.errors import UserError
from saap.base.gguf_header import GgufHeaderError, read_header
from saap.base.interpreters import PEER_PYTHON, python_with
from saap.models.gguf import read_tokenizer_fields

ROOT = Path(__file__).resolve().parents[3]
HEAD, KV_HEADS, WIDTH = 16, 2, 64
PLAN = BenchOptions(prompt=6, generate=5, threads=1, repetitions=1, warmup=2, timeout_s=60, cold=False)


tick = map(float, itertools.count()).__next__


def tiny_gguf(path: Path, *, untied: bool = False, architecture: str = "llama") -> Path:
    """Two layers of random Q8_0 weights, and no tokenizer: the bench gives token ids."""
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HIDDEN // HEAD)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    q8 = gguf.GGMLQuantizationType.Q8_0
    shapes = {"attn_q": HIDDEN, "attn_k": KV_HEADS * HEAD, "attn_v": KV_HEADS * HEAD, "attn_output": HIDDEN}
    shapes |= {"ffn_gate": WIDTH, "ffn_up": WIDTH, "ffn_down": HIDDEN}
    named = {f"blk.{n}.{name}.weight": rows for n in range(2) for name, rows in shapes.items()}
    for name, rows in {"token_embd.weight": VOCAB, **named, **({"output.weight": VOCAB} if untied else {})}.items():
        values = random.normal(0, 0.3, (rows, HIDDEN)).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(values, q8), raw_dtype=q8)
    for n in range(2):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{n}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def llama_cpp_python() -> str:
    try:
        return python_with(["llama_cpp"], "this test", "llama-cpp-python")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def genai_bundle(tmp_path: Path) -> Path:
    """The tiny bundle in the form that genai takes: it sizes its logits by the graph's dimension, a number."""
    return genai_form(tiny_bundle(tmp_path / "bundle"), eos=[VOCAB - 1])


def genai_form(directory: Path, eos: list[int]) -> Path:
    fields = {**vars(read_manifest(directory)), "eos_token_ids": eos}
    (directory / "genai_config.json").write_text(json.dumps(genai_config(BundleManifest(**fields))))
    model = onnx.load(directory / DECODE_GRAPH, load_external_data=False)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, directory / DECODE_GRAPH)
    write_manifest(directory, BundleManifest(**fields))
    return directory


def take_short_turns(specs: list[str], monkeypatch: pytest.MonkeyPatch) -> Bursts:
    for name, value in (("LOAD_S", 0.05), ("BURST_S", 0.001), ("MOST_LOADS", 4)):
        monkeypatch.setattr(turns, name, value)
    plan = BenchOptions(threads=1, prompt=4, generate=12, warmup=2, ratio_time_s=60)
    return take_bursts(read_peers(specs, plan.positions, names=["a", "b"]), plan.settings()[0], plan)


def test_genai_takes_turns_with_a_bundle(genai_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_genai")
    found = take_short_turns([str(genai_bundle), f"genai:{genai_bundle}"], monkeypatch)
    assert found.failure is None and found.ratio("a", "b", "decode") and found.ratio("a", "b", "prefill")


def test_llama_cpp_takes_turns_with_a_bundle(
    tmp_path: Path, llama_cpp_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, path = tiny_bundle(tmp_path / "bundle"), tiny_gguf(tmp_path / "tiny.gguf")
    found = take_short_turns([str(bundle), f"llama.cpp:{path}"], monkeypatch)
    assert found.failure is None and found.ratio("a", "b", "decode") and found.ratio("a", "b", "prefill")


def test_gguf_header_counts_what_a_token_reads(tmp_path: Path) -> None:
    tied, untied = (read_header(tiny_gguf(tmp_path / f"{u}.gguf", untied=u)) for u in (False, True))
    assert (tied.vocab_size, tied.context_length, tied.bits) == (VOCAB, CONTEXT, 8)
    rows = VOCAB + 2 * (HIDDEN + 2 * KV_HEADS * HEAD + HIDDEN + 2 * WIDTH + HIDDEN)
    assert tied.weight_bytes_per_token == rows * HIDDEN // 32 * 34 + 5 * HIDDEN * 4
    assert untied.weight_bytes_per_token == tied.weight_bytes_per_token  # the head instead of the table
    assert len(untied.tensors) == len(tied.tensors) + 1
    assert tied.kv_bytes_per_token(2) == 2 * KV_HEADS * 2 * HEAD * 2


def test_gguf_header_of_layers_that_differ(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "deci")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_head_count([4, 0, 2])
    writer.add_head_count_kv([2, 0, 1])
    writer.add_key_length(24)
    writer.add_value_length(8)
    writer.add_token_list(["a", "bc", "def"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = read_header(tmp_path / "a.gguf")
    assert header.vocab_size == 3 and header.context_length is None
    assert header.kv_bytes_per_token(4) == 3 * (24 + 8) * 4


def test_gguf_of_more_than_two_gigabytes(tmp_path: Path) -> None:
    path, offset = tmp_path / "large.gguf", 3 << 30
    first, last = (
        struct.pack("<Q1sIQIQ", 1, name, 1, 32, 0, start) for name, start in ((b"a", 0), (b"b", offset))
    )  # one dimension of 32 float32 numbers
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + first + last)
    start = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(start + offset + 32 * 4)  # a hole, which takes no room
    assert read_header(path).tensors["b"].offset == offset
    with path.open("r+b") as file:
        file.truncate(start + offset + 32 * 4 - 1)
    with pytest.raises(GgufHeaderError, match="cut off"):
        read_header(path)


def test_damaged_gguf_is_one_line(tmp_path: Path) -> None:
    whole = tiny_gguf(tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (4, 12, 30, 200, 900, len(whole) - 4096):
        cut.write_bytes(whole[:length])
        with pytest.raises(GgufHeaderError, match="cut off") as caught:
            read_header(cut)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    pairs = whole[:4] + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 9)
    for array in (struct.pack("<IQ", 4, 1 << 60), struct.pack("<IQ", 8, 1 << 30), struct.pack("<IQ", 9, 1) * 3000):
        cut.write_bytes(pairs + array)  # more numbers or strings than the file has bytes; arrays in arrays
        with pytest.raises(GgufHeaderError, match="cut off"):
            read_header(cut)
        with pytest.raises(UserError, match="cut off"):
            read_tokenizer_fields(cut)
    tokens = b"tokenizer.ggml.tokens"
    pair = struct.pack("<Q", len(tokens)) + tokens + struct.pack("<IIQQ", 9, 8, 1, 1) + b"\x9c"
    cut.write_bytes(whole[:4] + struct.pack("<IQQ", 3, 0, 1) + pair)
    with pytest.raises(UserError, match=r"damaged in tokenizer\.ggml\.tokens"):
        read_tokenizer_fields(cut)
    cut.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(GgufHeaderError, match="no GGUF file"):
        read_header(cut)
    cut.write_bytes(whole[:4] + (1).to_bytes(4, "little") + whole[8:])
    with pytest.raises(GgufHeaderError, match="GGUF version 1"):
        read_header(cut)
    with pytest.raises(GgufHeaderError, match="cannot be read"):
        read_header(tmp_path / "none.gguf")


def test_llama_cpp_steps_as_it_prefills(tmp_path: Path, llama_cpp_python: str) -> None:
    """A wrong position, a cache that was not cleared or a stale view of the logits would give other tokens."""
    path = tiny_gguf(tmp_path / "tiny.gguf")
    code = f"""
import json, itertools, numpy as np
from pathlib import Path
from export.engine.llama_cpp import LlamaCppEngine
from export.engine.protocol import EngineOptions
from bench.measure.worker import timed_pass
clock = map(float, itertools.count()).__next__
decoder = LlamaCppEngine(Path({str(path)!r}), EngineOptions(1, 40))
prompt = np.array([1, 5, 9, 7])
stepped = [timed_pass(decoder, prompt, 12, clock).tokens for _ in range(2)]
whole = []
for n in range(13):
    decoder.rewind(0)
    whole.append(int(np.argmax(decoder.prefill(np.array([1, 5, 9, 7, *whole])))))
print(json.dumps([*stepped, whole, decoder.prefill(prompt).shape]))
"""
    done = subprocess.run([llama_cpp_python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, again, whole, shape = json.loads(done.stdout)
    assert first == again == whole and len(first) == 13 and shape == [VOCAB]
    assert len(set(first)) > 3  # so that agreement says something


def test_logits_of_llama_cpp_are_those_of_its_steps(tmp_path: Path, llama_cpp_python: str) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    (peer,) = read_peers([f"llama.cpp:{path}"], 1)
    rows = np.array([[1, 5, 9, 7], [3, 3, 8, 2]])
    found = logits_in_process(peer.row, peer.path, 1)(rows)
    code = f"""
import json, numpy as np
from pathlib import Path
from export.engine.llama_cpp import LlamaCppEngine
from export.engine.protocol import EngineOptions
decoder = LlamaCppEngine(Path({str(path)!r}), EngineOptions(1, 8))
told = []
for row in {rows.tolist()!r}:
    decoder.rewind(0)
    told.append([decoder.prefill(np.array(row[:1])).tolist(), *(decoder.step(token).tolist() for token in row[1:])])
print(json.dumps(told))
"""
    done = subprocess.run([llama_cpp_python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.shape == (2, 4, VOCAB) and found.std() > 0.1
    assert np.abs(found - np.array(json.loads(done.stdout))).max() < 0.02 * found.std()
    odd = tiny_gguf(tmp_path / "odd.gguf", architecture="nothing")
    (broken,) = read_peers([f"llama.cpp:{odd}"], 1)
    with pytest.raises(UserError, match=r"cannot be opened in llama.cpp: .*cannot load"):
        logits_in_process(broken.row, broken.path, 1)(rows)


def test_llama_cpp_beside_a_bundle(tmp_path: Path, llama_cpp_python: str) -> None:
    bundle, path = tiny_bundle(tmp_path / "bundle"), tiny_gguf(tmp_path / "tiny.gguf")
    unknown = tiny_gguf(tmp_path / "odd.gguf", architecture="nothing")
    result = measure([str(bundle), f"llama.cpp:{path}", f"llama.cpp:{unknown}"], PLAN)
    ours, theirs, broken = result.measurements
    assert (theirs.name, theirs.kind) == ("tiny (llama.cpp)", "llama.cpp")
    assert len(ours.samples) == len(theirs.samples) == 1 and len(theirs.samples[0].token_s) == 5
    assert theirs.model.kv_bytes_per_token == 2 * KV_HEADS * 2 * HEAD * 2 and theirs.model.bits == 8
    assert theirs.model.model_bytes == path.stat().st_size and theirs.model.vocab_size == VOCAB
    assert "CPU" in result.versions["llama.cpp system"] and "n_ubatch 512" in result.versions["llama.cpp options"]
    assert broken.status == INVALID and broken.samples == []
    assert "cannot load" in broken.reasons[0] and "unknown model architecture" in broken.reasons[0]


def test_genai_draws_what_the_graph_says_and_goes_on_past_an_end_of_text(genai_bundle: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    from export.engine.genai import GenaiEngine

    prompt = np.array(random_tokens(6, VOCAB, 0))
    ours = timed_pass(OnnxRuntimeEngine(genai_bundle, EngineOptions(1, 26)), prompt, 20, tick).tokens
    assert VOCAB - 1 not in ours  # genai would have suppressed it
    decoder = GenaiEngine(genai_bundle, EngineOptions(1, 26))
    warm_up(decoder, prompt, 4, tick)
    theirs = [timed_pass(decoder, prompt, 20, tick) for _ in range(2)]
    assert [done.tokens for done in theirs] == [ours] * 2 and len(theirs[0].token_s) == 20
    genai_form(genai_bundle, eos=ours[:1])
    done = timed_pass(GenaiEngine(genai_bundle, EngineOptions(1, 18)), prompt, 12, tick)
    assert len(done.tokens) == 13 and ours[0] not in done.tokens


def test_genai_is_given_nothing_that_we_did_not_write(genai_bundle: Path) -> None:
    """A library that the configuration names would be loaded; it is not there, so genai would say so."""
    pytest.importorskip("onnxruntime_genai")
    from export.engine.genai import GenaiEngine

    path = genai_bundle / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "model.onnx.data"
    path.write_text(json.dumps(config))
    write_manifest(genai_bundle, read_manifest(genai_bundle))
    prompt = np.arange(3)
    ours = timed_pass(OnnxRuntimeEngine(genai_bundle, EngineOptions(1, 18)), prompt, 12, tick).tokens
    assert timed_pass(GenaiEngine(genai_bundle, EngineOptions(1, 18)), prompt, 12, tick).tokens == ours
    (genai_bundle / "bundle.json").unlink()  # now it is the folder of somebody's model builder
    assert timed_pass(GenaiEngine(genai_bundle, EngineOptions(1, 18)), prompt, 12, tick).tokens == ours


def test_genai_of_a_bundle_has_the_manifest_s_facts(genai_bundle: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    result = measure([str(genai_bundle), f"genai:{genai_bundle}"], PLAN)
    ours, theirs = result.measurements
    assert len(theirs.samples) == 1, theirs.reasons
    assert (theirs.name, theirs.kind) == ("bundle (genai)", "genai")
    assert theirs.model == ours.model and theirs.bundle_hash == ours.bundle_hash is not None
    assert "onnxruntime-genai" in result.versions


def test_a_foreign_model_is_told_by_the_size_of_its_files(tmp_path: Path) -> None:
    for name, size in (("a.onnx", 100), ("a.data", 1000)):
        (tmp_path / name).write_bytes(bytes(size))
    facts = file_facts(tmp_path / "a.onnx", tmp_path / "a.data")
    assert facts.model_bytes == 1100 and facts.weight_bytes_per_token is None
    assert set(facts.unknown) == {"parameters", "weight_bytes_per_token", "kv_bytes_per_token", "bits"}


@pytest.mark.parametrize("kind", ["torch", "optimum"])
def test_peers_decode_like_generate(kind: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from support.exported import export_portable
    from transformers import AutoModelForCausalLM

    path = model = tiny_model()
    if kind == "optimum":
        pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is an extra of its own")
        path = tmp_path / "bundle"
        export_portable(model, path)
        shutil.copy(model / "config.json", path)
    (peer,) = read_peers([f"{kind}:{path}"], 12)
    assert (peer.kind, peer.vocab_size, peer.bundle_hash is None) == (kind, 320, kind == "torch")
    decoder, prompt = peer.job(1, 32).open(), np.array([3, 1, 4, 1, 5])
    done = [timed_pass(decoder, prompt, 7, tick).tokens for _ in range(2)]
    expected = AutoModelForCausalLM.from_pretrained(model).generate(
        torch.from_numpy(prompt)[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert done == [expected[0, 5:].tolist()] * 2


@pytest.mark.skipif(os.name != "posix", reason="the stand-in interpreter is a shell script")
def test_a_peer_in_another_python_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process: an interpreter with a package of the peer's name, which aborts when it is used."""
    dies = "import os, sys\nprint('GGML_ASSERT(x) failed', file=sys.stderr)\nos.abort()\n"
    script = f'#!/bin/sh\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n'
    python = plant(tmp_path, {"packages/llama_cpp/__init__.py": dies, "python": script}) / "python"
    python.chmod(0o755)
    monkeypatch.setenv(PEER_PYTHON, str(python))
    bundle, path = tiny_bundle(tmp_path / "bundle"), tiny_gguf(tmp_path / "tiny.gguf")
    crashed, ours = measure([f"llama.cpp:{path}", str(bundle)], replace(PLAN, repetitions=2)).measurements
    assert crashed.status == INVALID and crashed.samples == []
    assert crashed.reasons == ["killed by SIGABRT: GGML_ASSERT(x) failed"]
    assert len(ours.samples) == 2


def test_same_directory_twice_gets_two_names(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "dense")
    assert [peer.name for peer in read_peers([str(bundle)] * 3, 8)] == ["dense", "dense #2", "dense #3"]


def test_torch_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8}))
    monkeypatch.setattr("export.engine.table.absent", list)
    with pytest.raises(UserError, match="pip install torch transformers"):
        read_peers([f"torch:{tmp_path}"], 8)


def test_bad_specs_are_one_line(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "a.gguf")
    bundle = tiny_bundle(tmp_path / "bundle")
    (tmp_path / "config.json").write_text("{}")
    whole = genai_config(read_manifest(bundle))
    for name, graph in (("long", "x" * 6000), ("above", "../model.onnx"), ("none", None), ("lost", "lost.onnx")):
        model = {**whole["model"], "decoder": {**whole["model"]["decoder"], "filename": graph}}
        plant(tmp_path / name, {"genai_config.json": json.dumps({"model": model})})
    for name, config in (("cut", "{"), ("list", "[]"), ("null", '{"vocab_size": null}')):
        plant(tmp_path / name, {"config.json": config})
    for spec, length, message in (
        (f"llama.cpp:{path}", CONTEXT + 1, "tokens of context do not fit"),
        (f"llama.cpp:{tmp_path / 'none.gguf'}", 8, "cannot be read"),
        (f"llama.cpp:{tmp_path}", 8, "cannot be read"),
        (f"genai:{tmp_path}", 8, "no genai_config.json"),
        (f"genai:{tmp_path / 'long'}", 8, r"length <= 255 - at `\$\.model\.decoder\.filename`"),
        (f"genai:{tmp_path / 'above'}", 8, "names the graph '../model.onnx', which is not there"),
        (f"genai:{tmp_path / 'none'}", 8, r"Expected `str`, got `null` - at `\$\.model\.decoder\.filename`"),
        (f"genai:{tmp_path / 'lost'}", 8, "names the graph 'lost.onnx', which is not there"),
        (f"optimum:{bundle}", 8, "no config.json in"),
        (f"optimum:{tmp_path}", 8, "there is no model.onnx"),
        ("torch:/nowhere", 8, "no config.json"),
        *((f"torch:{tmp_path / name}", 8, "damaged") for name in ("", "cut", "list", "null")),
        ("mlx:model", 8, "there is no runtime 'mlx'; give a bundle's path, BUNDLE@ENGINE, torch:DIR"),
        (f"prepacked:{bundle}", 8, "prepacked: was removed: give the bundle without it"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read_peers([spec], length)
        assert "\n" not in str(caught.value) and getattr(caught.value, "exit_code", None) == 2, spec
