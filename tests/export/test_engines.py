"""A bundle for several engines: the same integers in a file beside the graph, chosen with BUNDLE@ENGINE."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.command_line import here, refused
from support.cuts import cut
from support.export_cases import IDS, UNEVEN

from bench.runtimes.peers import read_peers
from export.bundle import Bundle
from export.bundle.manifest import BundleError, read_manifest
from export.engine.opening import logits_in_process
from export.engine.scoring import BundleScorer
from export.engine.spec import BundleSpec
from export.engine.table import engines_in, row_of
from export.options import ExportOptions
from export.write import export
from saap.base.errors import UserError
from saap.base.interpreters import PEER_PYTHON, python_with
from saap.prune.plan import PrunePlan
from saap.prune.vocabulary import Chosen, trim
from saap.text.closed_words import forest_of
from saap.tune import TuneOptions, tune

BOTH = ("onnxruntime", "llama.cpp")
TIMED = ("-p", 16, "-n", 4, "-t", 1, "-r", 1)
TEXT = "the quick brown fox jumps over the lazy dog\n" * 400


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "learn.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def tuned_bundle(llama, tmp_path_factory):
    """Export a pruned and tuned model for both engines."""
    home = tmp_path_factory.mktemp("engines")
    text = home / "learn.txt"
    text.write_text(TEXT)
    slim = cut(llama(home / "tiny"), home / "slim", PrunePlan(UNEVEN))
    tune(slim, TuneOptions(learning_rate=2e-2), output=home / "tuned", data=IDS.repeat(4, 1))
    export(home / "tuned", ExportOptions(engines=BOTH, text=str(text)), output=home / "bundle")
    return home / "bundle"


@pytest.fixture
def bundle(tuned_bundle, tmp_path, monkeypatch):
    """Copy that bundle, which a test may change, and give it a cache of its own."""
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(tuned_bundle, tmp_path / "bundle")


@pytest.fixture
def llama_cpp():
    try:
        return python_with(["llama_cpp"], "this test", "llama-cpp-python")
    except UserError as error:
        pytest.skip(str(error))


def test_a_bundle_holds_the_same_integers_for_llama_cpp(bundle):
    manifest = Bundle.open(bundle).check().manifest
    assert engines_in(manifest) == list(BOTH) and "model.gguf" in manifest.files
    assert manifest.lineage["engines"]["llama.cpp"]["exact"] is True
    assert engines_in(read_manifest(bundle)) == list(BOTH)


def test_llama_cpp_and_onnxruntime_say_the_same(bundle, llama_cpp):
    told = read_manifest(bundle)
    assert told.lineage["engines"]["llama.cpp"]["nll"] == pytest.approx(told.parity.nll_graph, abs=0.02)
    rows = IDS.numpy()
    theirs, ours = (
        logits_in_process(row_of("llama.cpp"), bundle / "model.gguf", 1)(rows),
        BundleScorer(bundle).logits(rows),
    )
    assert np.abs(theirs - ours).max() < 0.2 * ours.std()


def judged_and_timed(bundle, engine, place, ratio_time=0):
    """Measurements of a bundle in ONNX Runtime and in another engine, which says the same."""
    (place / "judge.txt").write_text("a river rose and a bridge was closed\n" * 60)
    words = ["--text", place / "judge.txt", "--chunk", 32, "--max-chunks", 4, "--json", place / "q.json"]
    spec = f"{bundle}@{engine}"
    here("eval", bundle, spec, *words)
    one, other = json.loads((place / "q.json").read_text())["rows"]
    assert other["name"] == spec and other["nll"] == pytest.approx(one["nll"], rel=0.01)
    here("bench", bundle, spec, *TIMED, "--ratio-time", ratio_time, "--json", place / "r.json")
    measured = json.loads((place / "r.json").read_text())["measurements"]
    assert [m["kind"] for m in measured][:2] == ["onnx", engine] and measured[1]["name"] == f"bundle@{engine}"
    assert measured[0]["bundle_hash"] == measured[1]["bundle_hash"]
    return measured


def test_eval_and_bench_run_the_engine_that_is_named(bundle, llama_cpp, tmp_path):
    assert judged_and_timed(bundle, "llama.cpp", tmp_path)[1]["choice"].startswith("flash")
    alone = [*TIMED, "--json", tmp_path / "alone.json"]
    assert "fastest: decode flash attention" in here("bench", f"{bundle}@llama.cpp", *alone).stdout


def test_a_baseline_of_an_engine_keeps_its_setting(bundle, llama_cpp, tmp_path):
    spec, folder = f"{bundle}@llama.cpp", tmp_path / "baselines"
    few = ["-p", 16, "-n", 8, "-t", 1, "-r", 6, "--sessions", 1]
    here("devices", "baseline", spec, "--baselines", folder, *few)
    (path,) = folder.glob("*.json")
    session = json.loads(path.read_text())["results"][0]
    (answer,) = session["settings"]["answers"].values()
    assert session["measurements"][0]["choice"] == session["settings"]["choice"] and len(answer["tokens"]) == 16
    tested = here("devices", "test", spec, "--baselines", folder, "--min-effect", 0.9, code=None)
    assert "bundle-llama.cpp" in tested.stdout


def test_a_damaged_file_of_an_engine_is_refused(bundle):
    with (bundle / "model.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f" if file.read(1) != b"\x7f" else b"\0")
    for spec in (f"{bundle}@llama.cpp", str(bundle)):
        with pytest.raises(BundleError, match=r"model.gguf does not match the hash"):
            read_peers([spec], 8)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("@tensorrt", "there is no engine 'tensorrt': onnxruntime, llama.cpp, openvino, fastest are known"),
        ("@llama.cpp", "has no file for llama.cpp: export it with --engines onnxruntime,llama.cpp"),
    ],
)
def test_an_engine_that_is_not_in_a_bundle_is_one_line(tiny_bundle, spec, said):
    assert said in refused("generate", f"{tiny_bundle}{spec}", "hello")
    assert said in refused("bench", f"{tiny_bundle}{spec}")
    assert said in refused("eval", f"{tiny_bundle}{spec}")


@pytest.fixture
def tiny_bundle(tiny_model, tmp_path, text):
    export(tiny_model(), ExportOptions(text=str(text), parity="none"), output=tmp_path / "plain")
    return tmp_path / "plain"


def test_generate_needs_the_engine_in_its_own_python(bundle, monkeypatch):
    monkeypatch.setattr("export.engine.table.absent", list)
    told = refused("generate", f"{bundle}@llama.cpp", "hello")
    assert "llama.cpp is not in this Python, and it is needed here: pip install llama-cpp-python" in told


def test_a_path_may_have_an_at_of_its_own(tmp_path):
    (tmp_path / "me@home").mkdir()
    assert BundleSpec.of(tmp_path / "me@home") == BundleSpec(tmp_path / "me@home", None)
    assert BundleSpec.of(f"{tmp_path}/me@home@fastest") == BundleSpec(tmp_path / "me@home", "fastest")
    assert BundleSpec.of("user@host:there").engine is None


def test_what_llama_cpp_cannot_hold_is_refused_before_integers_are_chosen(tiny_family, tmp_path):
    model = tiny_family("phi3")
    told = refused("export", model, "-o", tmp_path / "out", "--engines", "onnxruntime,llama.cpp")
    assert told.startswith("saap: --engines llama.cpp: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--engines vulkan", "--engines vulkan is not known: give onnxruntime, llama.cpp, openvino, or auto alone"),
        ("--engines llama.cpp", "a bundle is made for onnxruntime, too: add it to --engines"),
        ("--engines onnxruntime,llama.cpp --integers nearest", "leave --integers nearest out"),
        ("--engines onnxruntime,llama.cpp --target portable", "--engines is for --target cpu"),
        (
            "--engines onnxruntime,openvino --kv 8",
            "has an int8 cache (--kv 8), and openvino does not read that: leave openvino out",
        ),
    ],
)
def test_engines_that_do_not_go_with_the_rest_are_refused(tiny_model, tmp_path, words, said):
    assert said in refused("export", tiny_model(), "-o", tmp_path / "out", *words.split())


def test_auto_takes_the_engines_that_are_here_and_hold_the_model(tiny_model, tiny_family, tmp_path, text, monkeypatch):
    monkeypatch.setattr("export.engine.table.python_with", lambda *_: "python")
    monkeypatch.setattr("export.engines.logits_in_process", lambda *_: lambda _: torch.zeros(4, 256, 320).numpy())
    options = ExportOptions(engines=("auto",), text=str(text), parity="none")
    for model, expected in ((tiny_model(), [*BOTH, "openvino"]), (tiny_family("phi3"), ["onnxruntime", "openvino"])):
        made = export(model, options, output=tmp_path / f"out-{len(expected)}")
        assert engines_in(made.manifest) == expected


def test_a_file_that_computes_something_else_is_not_exported(tiny_model, tmp_path, text, monkeypatch):
    monkeypatch.setattr("export.engine.table.python_with", lambda *_: "python")
    monkeypatch.setattr("export.engines.logits_in_process", lambda *_: lambda _: torch.zeros(4, 256, 320).numpy())
    told = refused("export", tiny_model(), "-o", tmp_path / "out", "--engines", ",".join(BOTH), "--text", text)
    assert "llama.cpp computes something else than the graph (NLL 5.7683 instead of" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["all", "fewer"])
def test_openvino_reads_the_graph_of_any_bundle(tiny_model, tiny_tokenizer, tmp_path, text, monkeypatch, words):
    pytest.importorskip("openvino")
    monkeypatch.delenv(PEER_PYTHON, raising=False)
    model = tiny_model()
    if words == "fewer":
        forest = forest_of(json.loads(tiny_tokenizer.backend_tokenizer.to_str()), 320)
        model = trim(model, Chosen(tuple(sorted(forest.least)), 320, 0.01, "dice"), tmp_path / "trimmed")
    made = export(model, ExportOptions(engines=("onnxruntime", "openvino"), text=str(text)), output=tmp_path / "bundle")
    told = made.manifest.lineage["engines"]["openvino"]
    assert told["exact"] is True and told["nll"] == pytest.approx(made.manifest.parity.nll_graph, abs=0.02)
    assert engines_in(read_manifest(tmp_path / "bundle")) == ["onnxruntime", "openvino"]
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {*made.manifest.files, "bundle.json"}
    spec, prompt = f"{tmp_path / 'bundle'}@openvino", ["--raw", "--max-tokens", 8, "the quick"]
    assert here("generate", spec, *prompt).stdout == here("generate", tmp_path / "bundle", *prompt).stdout
    if words == "fewer":  # the commands below see the same engine
        return
    assert len(judged_and_timed(tmp_path / "bundle", "openvino", tmp_path, ratio_time=2)) == 2
    assert "only ONNX Runtime is asked zero-shot tasks" in refused("eval", spec, "--tasks", "piqa")


@pytest.mark.parametrize("family", ["qwen3", "lfm2", "qwen3_5_text", "gemma4_text"])
def test_families_with_an_architecture_of_their_own_keep_their_integers(family, tiny_family, tmp_path, text, llama_cpp):
    heads = {"linear_num_value_heads": 3, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    sizes = {"qwen3_5_text": heads, "gemma4_text": {"num_kv_shared_layers": 2}}.get(family, {})
    model = tiny_family(family, num_hidden_layers=4, **sizes)
    tune(model, TuneOptions(learning_rate=2e-2), output=tmp_path / "tuned", data=IDS.repeat(4, 1))
    made = export(tmp_path / "tuned", ExportOptions(engines=BOTH, text=str(text)), output=tmp_path / "bundle")
    told = made.manifest.lineage["engines"]["llama.cpp"]
    assert told["exact"] is True and told["nll"] == pytest.approx(made.manifest.parity.nll_graph, abs=0.02)
