"""What strangers made to do harm is refused in a line, soon, and without much memory."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnx")
from support.command_line import here
from support.hostile import (
    BASELINE,
    BUNDLES,
    DOCUMENTS,
    FOLLOWED,
    GGUFS,
    INSPECTED,
    MODELS,
    PICKLE,
    PICKLED,
    SCORED,
    seal,
)
from support.no_pickles import no_pickles
from support.old_products import old_products

from saap.base.errors import UserError
from saap.models import directory
from studies.fuzz.products import gguf_bytes, gguf_structure

PRODUCTS = old_products()
OLD = PRODUCTS / "bundle"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A bundle with a chat template, and libraries that are in memory before anything is measured."""
    bundle = tmp_path_factory.mktemp("good") / "bundle"
    shutil.copytree(OLD, bundle)
    config = json.loads((bundle / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (bundle / "tokenizer_config.json").write_text(json.dumps(config))
    seal(bundle)
    here("generate", bundle, "The river", "--max-tokens", 2, "--chat")
    for module in ("saap.prune.pruning", "bench.judge.regression", "bench.report"):
        pytest.importorskip(module)
    return bundle


@pytest.mark.parametrize("name", BUNDLES)
def test_a_hostile_bundle_is_refused(name, good, tmp_path, monkeypatch):
    bundle = tmp_path / "bundle"
    shutil.copytree(good, bundle)
    BUNDLES[name](bundle)
    seal(bundle)
    monkeypatch.chdir(tmp_path)
    sampled = ["--sample"] if name.startswith("generation") else []
    refused("generate", bundle, "The river", "--max-tokens", 4, "--chat", *sampled)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(("name", "change"), [*INSPECTED.items(), *((name, SCORED[name]) for name in SCORED)])
def test_a_hostile_bundle_is_refused_by_who_looks_into_it_or_scores(name, change, good, text, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(good, bundle)
    change(bundle)
    seal(bundle)
    if change in SCORED.values():
        refused("eval", bundle, "--text", text, "--chunk", 32, "--max-chunks", 2)
    else:
        refused("export", bundle, "--inspect")


def refused(*command):
    """A command ends with one line and exit code 2, soon and without much memory."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = here(*command, code=None)
    assert done.code == 2, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("saap: ")]  # beside what was done until then
    assert len(told) == 1 and done.stderr.splitlines()[-1] == told[0] and "Traceback" not in done.stderr, done.stderr
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


@pytest.fixture
def text(tmp_path):
    (tmp_path / "judge.txt").write_text("\n".join(f"No dog ran home {n} at night." for n in range(300)))
    return tmp_path / "judge.txt"


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_is_refused(name, tiny_model, text, tmp_path, monkeypatch):
    model = tiny_model("model")
    MODELS[name](model)
    monkeypatch.chdir(tmp_path)
    refused("export", model, "-o", "bundle", "--parity", "none")
    if name not in ("generation-config", "generation-config-beyond"):  # which evaluation does not read
        refused("eval", model, "--text", text, "--chunk", 32, "--max-chunks", 2)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", PICKLED)
def test_no_command_reads_weights_that_an_index_names_elsewhere(name, tiny_model, text, tmp_path, monkeypatch):
    model = tiny_model("model")
    PICKLED[name](model)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with no_pickles(tmp_path.parent / f"{tmp_path.name}-watch"):
        for command in (
            ["prune", model, "-o", "slim", "--ratio", 0.2, "--calibration", text],
            ["tune", model, "-o", "tuned", "--data", text],
            ["run", model, "-o", "run"],
            ["bench", f"torch:{model}", "-p", 4, "-n", 2],
        ):
            refused(*command)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", FOLLOWED)
def test_weights_that_only_transformers_would_follow_are_not_read(name, tiny_model, text, tmp_path, monkeypatch):
    model = tiny_model("model")
    FOLLOWED[name](model)
    monkeypatch.chdir(tmp_path)
    with no_pickles(tmp_path / "watch"):
        here("eval", model, "--text", text, "--chunk", 32, "--max-chunks", 2)
        here("bench", f"torch:{model}", "-p", 4, "-n", 2, "-t", 1, "--repetitions", 1, "--no-cold")
    assert not (tmp_path / "owned").exists()


def test_the_watch_sees_a_pickle_in_a_child(tmp_path):
    with pytest.raises(AssertionError, match="in <module>"), no_pickles(tmp_path / "watch"):
        code = "import torch; torch.load('nothing')"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


def test_links_of_the_hub_s_cache_are_followed_into_its_blobs(tiny_model, text, tmp_path):
    snapshot, blobs = tmp_path / "models--org--name/snapshots/abc", tmp_path / "models--org--name/blobs"
    tiny_model("model").rename(tmp_path / "plain")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (tmp_path / "plain").iterdir():
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        blob = blobs / (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    here("eval", snapshot, "--text", text, "--chunk", 32, "--max-chunks", 2)
    here("export", snapshot, "-o", tmp_path / "bundle", "--parity", "none")
    assert (tmp_path / "bundle/LICENSE").read_text() == "Test licence\n"
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to("../../../../plain/LICENSE")
    refused("export", snapshot, "-o", tmp_path / "other", "--parity", "none")


@pytest.mark.parametrize(("document", "name"), [(d, name) for d, changes in DOCUMENTS.items() for name in changes])
def test_a_hostile_measurement_is_refused(document, name, good, tmp_path, monkeypatch):
    place = tmp_path / document
    place.parent.mkdir(exist_ok=True)
    shutil.copy(PRODUCTS / document, place)
    DOCUMENTS[document][name](place)
    monkeypatch.chdir(tmp_path)
    for command in {
        "result.json": (["compare", PRODUCTS / document, place, "--no-confirm"], ["report", place, "-o", "page.html"]),
        "quality.json": (["compare", PRODUCTS / document, place], ["report", place, "-o", "page.html"]),
        "cost.json": (["prune", PRODUCTS / "dense", "-o", "slim", "--speedup", "1.2", "--costs", place],),
        BASELINE: (["devices", "test", PRODUCTS / "bundle", "--baselines", place.parent],),
    }[document]:
        if command[0] != "report" or name not in ("rows-none", "names"):  # which a page can show
            refused(*command)
    assert not {path.name for path in tmp_path.iterdir()} - {Path(document).parts[0]}


@pytest.fixture(scope="module")
def structure(tmp_path_factory):
    """A GGUF file's header, and what makes a file of one."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    here("export", PRODUCTS / "dense", "-o", path, "--target", "gguf", "--bits", 8)
    return gguf_structure(path)


@pytest.mark.parametrize("name", GGUFS)
def test_a_hostile_gguf_is_refused(name, structure, tmp_path, monkeypatch):
    document, data = json.loads(structure[0]), structure[1]
    GGUFS[name](document)
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(document, data))
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    refused("export", tmp_path / "model.gguf", "-o", tmp_path / "bundle", "--parity", "none")


def test_nothing_beside_a_gguf_is_read(structure, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(json.loads(structure[0]), structure[1]))
    adapter = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "adapter_model.bin").write_bytes(PICKLE)
    (tmp_path / "tokenizer_config.json").write_text("{")
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    with no_pickles(tmp_path / "watch"):
        here("export", tmp_path / "model.gguf", "-o", tmp_path / "bundle", "--parity", "none")


@pytest.mark.parametrize(
    "change",
    [
        {"results": ["/etc/passwd"]}, {"results": ["../result.json"]}, {"results": ["a\0b"]}, {"results": ["a" * 9999]},
        {"results": 5}, {"steps": [{"name": "a", "key": "k", "seconds": float("nan"), "command": "c"}]},
        {"versions": {"a": 5}}, {"device": {"name": 5}}, {"steps": "many"},
    ],
)  # fmt: skip
def test_a_hostile_run_is_refused(change, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({"model": "m", "steps": [], **change}))
    shutil.copy(PRODUCTS / "result.json", tmp_path)
    refused("report", tmp_path / "run", "-o", tmp_path / "page.html")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "result.json"}


def test_a_link_that_came_after_the_check_is_not_followed(tiny_model, tmp_path, monkeypatch):
    model, out, check = tiny_model("model"), tmp_path / "out", directory.check_files

    def checked(place):
        check(place)
        (model / "LICENSE").unlink()
        (model / "LICENSE").symlink_to("/etc/hostname")

    monkeypatch.setattr(directory, "check_files", checked)
    out.mkdir()
    with pytest.raises(UserError, match="LICENSE cannot be read"):
        directory.copy_sidecars(model, out)
    assert not (out / "LICENSE").exists()
