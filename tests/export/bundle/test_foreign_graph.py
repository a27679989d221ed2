"""A graph that asks for more memory than its weights explain is ended; one of other operators runs where it may."""

import json
import resource
import sys
from dataclasses import replace

import pytest

pytest.importorskip("onnx")
import numpy as np
import onnx
from onnx import helper
from support.command_line import here
from support.hostile import seal
from support.tiny_graphs import greedy_for_memory, tiny_bundle

from export.bundle import Bundle
from export.bundle.manifest import BundleError
from export.engine import onnxruntime as engine
from export.engine.protocol import EngineError, EngineOptions

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")


@LINUX
@pytest.mark.parametrize("when", ["load", "run"])
def test_a_graph_that_takes_all_memory_is_ended(when, tmp_path):
    bundle = greedy_for_memory(tiny_bundle(tmp_path / "bundle"), when)
    with pytest.raises(EngineError, match=r"cannot be run|cannot load") as caught:
        engine.open(bundle, EngineOptions(max_length=64)).prefill(np.array([1, 2]))
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20  # KiB
    np.ones(3 << 27, np.uint8)  # the limit is gone with the graph


def swish(bundle):
    """Give the graph an operator that ONNX Runtime has and saap does not write."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("HardSwish", ["before"], ["logits"]))
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    seal(bundle)
    return bundle


def test_other_operators_run_where_the_user_says_so(tmp_path):
    bundle = swish(tiny_bundle(tmp_path / "bundle"))
    with pytest.raises(BundleError, match=r"HardSwish.*--foreign-graph"):
        engine.open(bundle, EngineOptions(max_length=64))
    logits = engine.open(bundle, EngineOptions(max_length=64, foreign_graph=True)).prefill(np.array([1, 2]))
    assert logits.shape == (96,)
    options = ("-p", 4, "-n", 2, "-t", 1, "-r", 1, "--no-cold", "--json", tmp_path / "result.json")
    refusal = here("bench", bundle, *options, code=None)
    assert "HardSwish" in refusal.stdout + refusal.stderr
    here("bench", bundle, "--foreign-graph", *options, code=None)
    assert json.loads((tmp_path / "result.json").read_text())["measurements"][0]["samples"]


@LINUX
def test_a_foreign_graph_has_a_limit_of_memory(tmp_path):
    bundle = greedy_for_memory(tiny_bundle(tmp_path / "bundle"), "run", "ConstantOfShape")
    out = tmp_path / "result.json"
    here("bench", bundle, "--foreign-graph", "-p", 4, "-n", 2, "-t", 1, "-r", 1, "--no-cold", "--json", out, code=None)
    assert "cannot be run" in json.loads(out.read_text())["measurements"][0]["reasons"][0]
    with pytest.raises(BundleError, match="ConstantOfShape"):
        Bundle.open(bundle).graph()
    assert replace(Bundle.open(bundle), foreign=True).graph_bytes()
