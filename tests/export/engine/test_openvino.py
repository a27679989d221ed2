"""A bundle's graph in a real OpenVINO: what it computes, and what its cache holds."""

import numpy as np
import pytest
from support.cuts import cut
from support.export_cases import IDS, UNEVEN
from support.exported import export_bundle, export_portable

from bench.runtimes.peers import PeerError, read_peers
from export.bundle import Bundle
from export.bundle.manifest import BundleError, read_manifest
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.opening import logits_in_process
from export.engine.protocol import EngineError, EngineOptions
from export.engine.scoring import BundleScorer
from export.engine.spec import BundleSpec
from saap.prune.plan import PrunePlan

openvino = pytest.importorskip("openvino")
module = pytest.importorskip("export.engine.openvino")
NAMES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "smollm3", "olmo2", "granite")
FAMILIES = (*((name, {}) for name in NAMES), ("mistral", {"sliding_window": 6}))


def greedy(decoder, count):
    logits, tokens = decoder.prefill(IDS[0, :9].numpy()), []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = decoder.step(tokens[-1])
    return tokens, np.array(logits)


@pytest.mark.parametrize(("family", "sizes"), FAMILIES)
def test_every_family_in_float32_says_what_onnxruntime_says(family, sizes, tiny_family, tmp_path):
    export_bundle(tiny_family(family, **sizes), tmp_path / "bundle", bits=32)
    (theirs, last), (ours, expected) = (
        greedy(kind(tmp_path / "bundle", EngineOptions(1, 48)), 32)
        for kind in (module.OpenVinoEngine, OnnxRuntimeEngine)
    )
    assert theirs == ours
    assert np.abs(last - expected).max() <= 1e-3


@pytest.fixture
def uneven(tiny_model, tmp_path):
    """4 bit, layers of their own sizes, one without attention and one without FFN."""
    export_bundle(cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN)), tmp_path / "uneven")
    return tmp_path / "uneven"


def nll(logits, ids):
    rows = logits[:, :-1].astype(np.float64)
    rows = rows - rows.max(-1, keepdims=True)
    taken = np.take_along_axis(rows, ids[:, 1:, None], 2)[..., 0]
    return float((np.log(np.exp(rows).sum(-1)) - taken).mean())


def test_uneven_integers_mean_the_same(uneven):
    (peer,) = read_peers([f"{uneven}@openvino"], 64)
    assert (peer.kind, peer.name) == ("openvino", "uneven@openvino")
    assert peer.bundle_hash == Bundle.open(uneven).check().manifest.content_hash
    rows = IDS.numpy()
    theirs = logits_in_process(peer.row, peer.path, 1)(rows)
    ours = BundleScorer(uneven).logits(rows)
    assert theirs.shape == ours.shape and nll(theirs, rows) == pytest.approx(nll(ours, rows), rel=0.01)
    decoder = module.OpenVinoEngine(uneven, EngineOptions(1, 64))
    last = [decoder.prefill(rows[0, :5])] and decoder.prefill(rows[0, 5:])  # a prompt in two pieces
    assert np.abs(last - theirs[0, -1]).max() <= rounding(decoder)


def rounding(decoder):
    """Return the tolerance of logits computed in other pieces: a CPU with bfloat16 takes it for integers."""
    return 0.1 if "bfloat16" in str(decoder.compiled.get_property("INFERENCE_PRECISION_HINT")) else 1e-3


def test_the_cache_goes_back_and_starts_again(uneven):
    decoder, prompt = module.OpenVinoEngine(uneven, EngineOptions(2, 64)), IDS[0].numpy()
    expected = np.array(decoder.prefill(prompt))
    decoder.step(3)
    decoder.rewind(10)
    assert np.abs(decoder.prefill(prompt[10:]) - expected).max() <= rounding(decoder)
    decoder.rewind(0)
    assert np.abs(decoder.prefill(prompt) - expected).max() <= rounding(decoder)
    with pytest.raises(EngineError, match="the cache holds 64 positions and 65 are needed"):
        decoder.prefill(np.arange(65 - len(prompt)))


def test_its_facts_are_told(uneven):
    engine = module.OpenVinoEngine(uneven, EngineOptions(1, 64))
    versions = engine.versions()
    assert versions["openvino"].startswith("20") and "KV_CACHE_PRECISION" in versions["openvino options"]
    assert engine.facts() is None  # the manifest has them


def test_a_directory_of_openvino_s_own_format_is_a_peer(uneven, tiny_model, tmp_path):
    place = tmp_path / "ir"
    place.mkdir()
    export_bundle(tiny_model(), tmp_path / "plain", bits=32)
    export_portable(tiny_model(), tmp_path / "portable", bits=32)  # GroupQueryAttention has no form of its own there
    cache = read_manifest(tmp_path / "portable").cache
    model = module._with_state(openvino.Core().read_model(tmp_path / "portable/model.onnx"), cache)
    openvino.save_model(model, place / "openvino_model.xml")
    (place / "config.json").write_text('{"vocab_size": 320, "max_position_embeddings": 64}')
    (peer,) = read_peers([f"openvino:{place}"], 32)
    assert peer.name == "ir (openvino)"
    own = OnnxRuntimeEngine(tmp_path / "plain", EngineOptions(1, 64)).prefill(IDS[0].numpy())
    ir = module.OpenVinoEngine(peer.path, EngineOptions(1, 64))
    most = max(1e-2 * own.std(), rounding(ir))  # floats of an IR are stored as float16
    assert np.abs(ir.prefill(IDS[0].numpy()) - own).max() <= most
    assert ir.facts().model_bytes > 10_000
    with pytest.raises(PeerError, match="65 tokens of context do not fit"):
        read_peers([f"openvino:{place}"], 65)
    with pytest.raises(PeerError, match=r"there is no openvino_model\.xml in .*uneven; give .* BUNDLE@openvino"):
        read_peers([f"openvino:{uneven}"], 32)


def test_what_openvino_does_not_read_is_refused(tiny_model, tmp_path):
    export_bundle(tiny_model(), tmp_path / "int8", ids=IDS, kv_bits=8)
    export_bundle(tiny_model(), tmp_path / "cuda", target="cuda")
    for name, reason in (
        ("int8", r"has an int8 cache \(--kv 8\), and openvino does not read that: leave openvino out"),
        ("cuda", "is for cuda: openvino reads bundles of --target cpu"),
    ):
        with pytest.raises(BundleError, match=reason):
            BundleSpec.of(f"{tmp_path / name}@openvino").source(Bundle.open(tmp_path / name))
