"""What a bundle shows of itself, and data files outside its folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from support.edited import edited
from support.tiny_graphs import tiny_bundle

from export.bundle import graph_check
from export.bundle.graph_check import MOST_NODES, check_graph, read_contents
from export.bundle.inspect import UNVERIFIED, inspect_bundle
from export.bundle.manifest import BundleError, read_manifest
from saap.base.files import sha256_file


def test_a_bundle_of_floats(tmp_path):
    inspected = inspect_bundle(tiny_bundle(tmp_path / "bundle"))
    report = inspected.document()
    assert [(x["query_heads"], x["kv_heads"], x["ffn"]) for x in report["layers"]] == [
        (4, 2, 128), (0, 0, 64), (3, 1, 96),
    ]  # fmt: skip
    assert report["bytes_per_token"]["kv_cache"] == 2 * 3 * 16 * 4
    assert {file["state"] for file in report["files"]} == {"ok"}
    assert json.loads(json.dumps(report)) == report
    lines = inspected.lines()
    assert report["verified"] is False and lines[0] == UNVERIFIED and UNVERIFIED.startswith("UNVERIFIED")


def test_damage_is_shown(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle")
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[77] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    (bundle / "genai_config.json").unlink()
    inspected = inspect_bundle(bundle)
    states = {file.name: file.state for file in inspected.files}
    assert states == {
        "model.onnx": "ok", "scoring.onnx": "ok", "model.onnx.data": "differs from its hash",
        "genai_config.json": "missing",
    }  # fmt: skip
    assert any("DAMAGED: genai_config.json (missing), model.onnx.data" in x for x in inspect_bundle(bundle).lines())


def test_equal_layers_share_a_row(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle")
    sizes = {"query_heads": 4, "kv_heads": 2, "ffn": 128}
    edited(bundle / "bundle.json", layers=[sizes, sizes, {**sizes, "ffn": 0}])
    title, columns, rows = inspect_bundle(bundle).tables()[0]
    assert (title, columns) == ("layers", ["layers", "query heads", "KV heads", "FFN"])
    assert rows == [["0-1", "4", "2", "128"], ["2", "4", "2", "0"]]
    short = {"query_heads": 0, "kv_heads": 0, "ffn": 64, "conv": 32}
    edited(bundle / "bundle.json", layers=[short, sizes], conv_kernel=3)
    _, columns, rows = inspect_bundle(bundle).tables()[0]
    assert columns[3] == "convolution" and rows == [["0", "0", "0", "32", "64"], ["1", "4", "2", "0", "128"]]


def test_parity_and_provenance_are_shown(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle")
    parity = {
        "tokens": 80, "sample": "dice", "max_abs_logit_difference": 0.25, "kl": 0.001, "top1_agreement": 0.9875,
        "nll_torch": 1.0, "nll_graph": 1.0021, "perplexity_torch": 2.7183, "perplexity_graph": 2.724,
        "perplexity_ratio": 1.0021, "accuracy_level": 4,
    }  # fmt: skip
    lineage = {
        "model_sha256": "a" * 64, "base": "tiny", "base_sha256": "b" * 64, "method": "saap",
        "plan": {"asked": {"ratio": 0.2}, "planned": {"ratio": 0.201}, "achieved": {"ratio": 0.2013}},
        "calibration": {"sha256": "c" * 64, "source": "letters"}, "versions": {"saap": "0.1.0"},
    }  # fmt: skip
    edited(bundle / "bundle.json", parity=parity, lineage=lineage)
    inspected = inspect_bundle(bundle)
    report = inspected.document()
    text = "\n".join(inspected.lines())
    assert report["verified"] is True
    assert "UNVERIFIED" not in text
    assert (
        "the graph computes what torch computes with the same integers: on 80 tokens (dice) logit difference 0.25, "
        "KL 0.001, top-1 agreement 98.75%, perplexity x 1.0021" in text
    )
    assert "base: tiny, sha256 bbbbbbbbbbbbbbbb\n" in text
    assert "pruned by: saap, asked ratio 0.2, planned 20.10%, achieved 20.13%" in text
    assert "calibrated on: letters, sha256 cccccccccccccccc" in text


def with_location(bundle: Path, location: str, name: str = "model.onnx") -> Path:
    model = onnx.load(bundle / name, load_external_data=False)
    changed = 0
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value, changed = location, changed + 1
    assert changed
    (bundle / name).write_bytes(model.SerializeToString())
    return bundle / name


@pytest.mark.parametrize(
    "location", ["../other.data", "/etc/hostname", "sub/../../other.data", "..\\other.data", "o\0er"]
)
def test_weights_outside_the_folder_are_refused(tmp_path, location):
    bundle = tiny_bundle(tmp_path / "bundle")
    shutil.copyfile(bundle / "model.onnx.data", tmp_path / "other.data")
    graph = with_location(bundle, location)
    with pytest.raises(BundleError, match=r"outside the bundle's folder: do not use it") as caught:
        check_graph(graph)
    assert "\n" not in str(caught.value)


def test_links_and_scoring_graphs_that_lead_outside_are_refused(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle")
    with_location(bundle, "../model.onnx.data", "scoring.onnx")
    with pytest.raises(BundleError, match=r"scoring\.onnx wants its weights in '\.\./model\.onnx\.data'"):
        check_graph(bundle / "scoring.onnx")
    (bundle / "model.onnx.data").rename(tmp_path / "elsewhere.data")
    (bundle / "model.onnx.data").symlink_to(tmp_path / "elsewhere.data")
    with pytest.raises(BundleError, match="outside the bundle's folder"):
        check_graph(bundle / "model.onnx")


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_every_place_of_a_tensor_is_looked_at(tmp_path):
    """An attribute, a branch, a sparse tensor, a function: each may name a file."""
    constant = helper.make_node("Constant", [], ["c"], value=external("constant"))
    branch = helper.make_graph([helper.make_node("Identity", ["t"], ["b"])], "b", [], [], [external("branch")])
    chosen = helper.make_node("If", ["x"], ["y"], then_branch=branch)
    graph = helper.make_graph([constant, chosen], "g", [], [], [external("initialiser"), external("initialiser")])
    graph.sparse_initializer.add(values=external("sparse values"), indices=external("sparse indices"))
    model = helper.make_model(graph)
    inner = helper.make_node("Constant", [], ["c"], value=external("function"))
    model.functions.append(helper.make_function("d", "f", [], ["c"], [inner], [helper.make_opsetid("", 17)]))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert sorted(read_contents(tmp_path / "model.onnx").locations) == [
        "branch", "constant", "function", "initialiser", "sparse indices", "sparse values",
    ]  # fmt: skip


def test_a_graph_that_takes_more_than_its_files_hold_is_refused(tmp_path):
    """Graphs in attributes, functions, tensors of 2^60 elements, operators that a library would bring."""

    def written(*nodes, tensors=(), functions=()):
        model = helper.make_model(helper.make_graph([*nodes], "g", [], [], [*tensors]))
        model.functions.extend(functions)
        return model.SerializeToString()

    branch = helper.make_graph([helper.make_node("Identity", ["t"], ["b"])], "b", [], [])
    loop = helper.make_node("Loop", ["x", ""], ["y"], body=branch)
    function = helper.make_function("d", "f", [], ["c"], [], [helper.make_opsetid("", 17)])
    huge = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2**30, 2**30], raw_data=b"1234")
    deep = branch
    for _ in range(12):
        deep = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=deep)], "d", [], [])
    for content, problem in (
        (written(loop), r"branches or loops \(If, Loop\)"),
        (written(functions=[function]), "holds functions"),
        (written(tensors=[huge]), "more elements than its files have bits"),
        (
            written(helper.make_node("Run", ["x"], ["y"], domain="evil\u2028ops")),
            r"the operator 'evil\\u2028ops:Run', which saap",
        ),
        (written(helper.make_node("RandomNormal", [], ["x"], shape=[2**33])), "'RandomNormal', which saap does not"),
        (written(tensors=[TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2**40, 0])]), "more elements than"),
        (written(*(helper.make_node("Relu", ["x"], ["x"]) for _ in range(MOST_NODES + 1))), "more than 200000 nodes"),
        (written(*deep.node), "is not an ONNX file"),
    ):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(BundleError, match=problem):
            check_graph(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(written(loop))
    assert check_graph(tmp_path / "model.onnx", allowed=None) == []


def test_what_is_no_graph_is_refused_in_one_line(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle")
    whole = (bundle / "model.onnx").read_bytes()
    for content in (b"", b"\xff" * 40, whole[: len(whole) // 2]):
        (bundle / "model.onnx").write_bytes(content)
        with pytest.raises(BundleError, match=r"model\.onnx is not an ONNX file: export the bundle again"):
            check_graph(bundle / "model.onnx")
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        check_graph(bundle / "model.onnx")
    with pytest.raises(BundleError, match="it has no bundle"):
        inspect_bundle(tmp_path)
    bundle = tiny_bundle(tmp_path / "again")
    (tmp_path / "again/circle").symlink_to("circle")
    with_location(bundle, "circle")
    with pytest.raises(BundleError, match="'circle', outside the bundle's folder: do not use it"):
        check_graph(bundle / "model.onnx")
    for lost in ("lost.data", 300 * "a"):  # the second is a name that no file system has
        with_location(bundle, lost)
        with pytest.raises(BundleError, match=rf"'{lost}', which is missing: export the bundle again"):
            check_graph(bundle / "model.onnx")


def test_a_graph_is_read_once_by_all_processes_of_a_user(tmp_path, monkeypatch):
    """What was read is kept by the content's hash; a damaged entry, or one of another reader, does not count."""
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    graph, reads = tiny_bundle(tmp_path / "bundle") / "model.onnx", []
    monkeypatch.setattr(graph_check, "read_contents", lambda path: reads.append(path) or read_contents(path))

    def check():
        data = check_graph(graph, sha256=sha256_file(graph))
        assert [file.name for file in data] == ["model.onnx.data"]
        return len(reads)

    assert (check(), check()) == (1, 1)
    (kept,) = (tmp_path / "cache/graphs").iterdir()
    kept.write_bytes(b'{"nodes": "x"}')
    assert (check(), check()) == (2, 2)
    monkeypatch.setattr(graph_check, "_version", lambda: "other")
    assert check() == 3
    graph.write_bytes(graph.read_bytes() + b" ")
    with pytest.raises(BundleError, match="not an ONNX file"):
        check()


def test_the_check_runs_on_a_board(tmp_path):
    """No torch, no onnx: it stands before every session that a board opens."""
    bundle = tiny_bundle(tmp_path / "bundle")
    code = (
        "import sys\nfrom export.bundle.graph_check import check_graph\n"
        f"print([p.name for p in check_graph({str(bundle / 'model.onnx')!r})])\n"
        "assert not {'torch', 'onnx', 'numpy', 'onnx_ir', 'google.protobuf'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "['model.onnx.data']", "")
    assert read_manifest(bundle).parity is None
