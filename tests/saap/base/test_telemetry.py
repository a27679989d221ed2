"""What libraries could report stays here; test_docs.py runs the commands without network and traces their calls."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_libraries_are_told_before_they_are_loaded():
    script = "import export.engine.session, os, sys; assert 'onnxruntime' not in sys.modules; print(dict(os.environ))"
    for given, told in ((None, "1"), ("1", None)):
        env = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "SAAP_TELEMETRY")}
        env |= {} if given is None else {"SAAP_TELEMETRY": given}
        done = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, check=True)
        found = re.search(rb"'ORT_DISABLE_TELEMETRY': '(\d)'", done.stdout)
        assert (found and found[1].decode()) == told


def test_openvino_goes_without_its_reporter(tmp_path):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is an extra of its own")
    script = "import saap, openvino; openvino.Core()"
    env = {k: v for k, v in os.environ.items() if k != "SAAP_TELEMETRY"} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, check=True)
    assert not list(tmp_path.iterdir())
