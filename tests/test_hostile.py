"""What strangers made to do harm is refused in a line, soon, and without much memory."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("onnx")
from support.command_line import here
from support.hostile import BUNDLES, MODELS, seal

OLD = Path(__file__).parent / "support" / "old" / "bundle"


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
    if name != "generation-config":  # which evaluation does not read
        refused("eval", model, "--text", text, "--chunk", 32, "--max-chunks", 2)
    assert not (tmp_path / "bundle").exists()
