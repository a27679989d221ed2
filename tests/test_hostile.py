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
from support.hostile import BUNDLES, seal

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
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sampled = ["--sample"] if name.startswith("generation") else []
    done = here("generate", bundle, "The river", "--max-tokens", 4, "--chat", *sampled, code=None)
    assert done.code == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("saap: "), done.stderr
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
