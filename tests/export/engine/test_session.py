"""ONNX Runtime writes no lines of its own before ours."""

import shutil
import subprocess
import sys

import pytest

pytest.importorskip("onnx")
from support.hostile import SCORED, seal
from support.old_products import old_products

READ = """
import sys
import numpy as np
from export.engine.scoring import BundleScorer
scorer = BundleScorer(sys.argv[1])
scorer.read(np.array([[1, 2, 3]]), last=True)
"""


@pytest.mark.parametrize(("change", "message"), [(None, ""), ("seven-tokens", "EngineError: the graph cannot be run")])
def test_a_graph_s_stderr_has_no_line_of_onnxruntime(change, message, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(old_products() / "bundle", bundle)
    if change:
        SCORED[change](bundle)
        seal(bundle)
    done = subprocess.run([sys.executable, "-c", READ, bundle], capture_output=True, text=True, check=False)
    assert message in done.stderr and bool(done.returncode) is bool(message)
    assert "onnxruntime:," not in done.stderr and "\x1b" not in done.stderr
