"""The decoder that generates and that is measured."""

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.edited import edited
from support.tiny_graphs import CONTEXT, VOCAB, tiny_bundle

from export.bundle.graph_check import ALL
from export.bundle.manifest import BundleError, read_manifest, write_manifest
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineError, EngineOptions
from export.engine.scoring import BundleScorer

IDS = np.random.default_rng(3).integers(VOCAB, size=20)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


def test_prefills_and_steps_equal_one_longer_prefill(bundle: Path) -> None:
    whole = OnnxRuntimeEngine(bundle, EngineOptions(1, 32)).prefill(IDS).copy()
    stepped = OnnxRuntimeEngine(bundle, EngineOptions(1, 64))
    stepped.prefill(IDS[:7])
    stepped.prefill(IDS[7:12])
    for token in IDS[12:]:
        last = stepped.step(int(token))
    assert last.shape == (VOCAB,)
    np.testing.assert_allclose(last, whole, atol=2e-5)
    assert stepped.length == len(IDS)


@pytest.mark.parametrize("piece", [1, 7, 10, 19, 20, 21])
def test_a_long_prompt_is_read_in_pieces(bundle: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    decoder = OnnxRuntimeEngine(bundle, EngineOptions(1, 32))
    whole = decoder.prefill(IDS).copy()
    runs = []
    run = decoder._run
    monkeypatch.setattr("export.engine.onnxruntime.PREFILL_CHUNK", piece)
    monkeypatch.setattr(decoder, "_run", lambda ids: runs.append(ids.shape[1]) or run(ids))
    decoder.rewind(0)
    np.testing.assert_allclose(decoder.prefill(IDS), whole, atol=2e-5)
    assert sum(runs) == len(IDS) == decoder.length and max(runs) == min(piece, len(IDS))
    with pytest.raises(EngineError, match="holds 32 positions and 40 are needed"):
        decoder.prefill(IDS)
    assert decoder.length == len(IDS)  # no piece of a prompt that does not fit was read


def test_scoring_gives_every_position(bundle: Path, tmp_path: Path) -> None:
    scorer = BundleScorer(bundle, 1)
    (every,) = scorer.logits(IDS[None])
    assert (every.shape, every.dtype) == ((len(IDS), VOCAB), np.float32)
    rows = np.stack([IDS, IDS[::-1]])  # rows do not see one another
    np.testing.assert_allclose(scorer.logits(rows)[0], every, atol=2e-5)
    shutil.copytree(bundle, tmp_path, dirs_exist_ok=True)
    (tmp_path / "scoring.onnx").unlink()
    write_manifest(tmp_path, read_manifest(tmp_path))
    with pytest.raises(EngineError, match=r"no scoring\.onnx"):
        BundleScorer(tmp_path)
    decoder = OnnxRuntimeEngine(bundle, EngineOptions(1, 32))
    for i in (1, 9, 20):
        decoder.rewind(0)
        np.testing.assert_allclose(every[i - 1], decoder.prefill(IDS[:i]), atol=2e-5)


def test_past_and_present_share_one_buffer(bundle: Path) -> None:
    decoder = OnnxRuntimeEngine(bundle, EngineOptions(1, 32))
    assert decoder._session.get_session_options().intra_op_num_threads == 1
    decoder.prefill(IDS)
    cache = {part.past: value for part, value in decoder._kv}
    key = cache["past_key_values.1.key"].numpy()
    assert key.shape == (1, 1, 32, 16)  # the attention-free layer is not counted
    assert np.abs(key[0, 0, : len(IDS)]).sum(axis=-1).all()
    assert not key[0, 0, len(IDS) :].any()


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_a_rewound_sequence_continues_as_if_nothing_had_followed(
    bundle: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A portable bundle cannot write into its past; the tiny graph can be run that way too."""
    monkeypatch.setattr("export.bundle.bundle.STANDARD", ALL)  # its operators are ONNX Runtime's own
    shutil.copytree(bundle, tmp_path, dirs_exist_ok=True)
    edited(tmp_path / "bundle.json", target=target)
    decoder, shared = OnnxRuntimeEngine(tmp_path, EngineOptions(1, 32)), OnnxRuntimeEngine(bundle, EngineOptions(1, 32))
    whole = decoder.prefill(IDS).copy()  # of a fresh cache; all later ones find an old sequence in it
    for kept in (7, 0):
        decoder.rewind(0)
        decoder.prefill(IDS[:7])
        decoder.prefill(IDS[10:15])
        decoder.step(3)
        decoder.rewind(kept)
        assert decoder.length == kept
        np.testing.assert_allclose(decoder.prefill(IDS[kept:]), whole, atol=2e-5)
    shared.prefill(IDS)
    np.testing.assert_allclose(decoder.step(5), shared.step(5), atol=2e-5)
    decoder.rewind(20)
    with pytest.raises(EngineError, match="21 positions cannot be kept: give 0 to 20, which are in use"):
        decoder.rewind(21)


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("threads", "length", "message"),
    [
        (1, 0, rf"0 tokens of context .* 1 to {CONTEXT}"),
        (1, CONTEXT + 1, rf"{CONTEXT + 1} tokens of context .* 1 to {CONTEXT}"),
        (0, 8, "0 threads"),
        (-1, 8, "-1 threads"),
        (CORES + 1, 8, f"{CORES + 1} threads"),
    ],
)
def test_context_and_threads_are_refused(bundle: Path, threads: int, length: int, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        OnnxRuntimeEngine(bundle, EngineOptions(threads, length))


def test_full_cache_is_refused(bundle: Path) -> None:
    decoder = OnnxRuntimeEngine(bundle, EngineOptions(1, 4))
    decoder.prefill(IDS[:4])
    with pytest.raises(EngineError, match="holds 4 positions and 5 are needed"):
        decoder.step(1)


def test_broken_graphs_and_other_targets_are_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path, dirs_exist_ok=True)
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"not a graph")
    write_manifest(tmp_path, read_manifest(tmp_path))
    with pytest.raises(BundleError, match="is not an ONNX file"):
        OnnxRuntimeEngine(tmp_path, EngineOptions(1, 8))
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    model.graph.node[0].op_type, op_type = "NoSuchOperator", model.graph.node[0].op_type
    onnx.save(model, graph)
    write_manifest(tmp_path, read_manifest(tmp_path))
    with pytest.raises(BundleError, match="the operator 'NoSuchOperator', which saap does not have"):
        OnnxRuntimeEngine(tmp_path, EngineOptions(1, 8))
    model.graph.node[0].op_type = op_type
    model.graph.node[0].input[0] = "nobody writes it"
    onnx.save(model, graph)
    write_manifest(tmp_path, read_manifest(tmp_path))
    with pytest.raises(EngineError, match="cannot load") as caught:
        OnnxRuntimeEngine(tmp_path, EngineOptions(1, 8))
    assert "\n" not in str(caught.value)
    edited(tmp_path / "bundle.json", target="cuda")
    with pytest.raises(EngineError, match="bundle for cuda"):
        OnnxRuntimeEngine(tmp_path, EngineOptions(1, 8))
