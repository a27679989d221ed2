"""What commit 760273a wrote still works, and today's code writes the same: ``tests/support/old/README.md``."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import torch
from support.command_line import here
from transformers import AutoTokenizer

from bench.judge.baselines import read_baselines
from bench.judge.regression import DeviceTest, retest
from bench.judge.verdict import CANNOT_TELL
from bench.measure.result import Result, read_result
from export.bundle.manifest import verify_files
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.shape import LayerSizes
from saap.prune.search.layer_costs import read_costs

OLD = Path(__file__).parent / "support" / "old"
MODELS = ("flap", "shortgpt", "tuned")  # the search of saap itself is another since then


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("SAAP_DATA", raising=False)


# -- old products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits"), [("slim", 32), ("tuned", 4)])
def test_an_old_directory_loads_and_runs(name: str, bits: int) -> None:
    model = load_model(OLD / name).eval()
    ids = AutoTokenizer.from_pretrained(OLD / name)("The river holds the paper, 512.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape == (1, ids.shape[1], 320) and torch.isfinite(logits).all()
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths == [128, 96, 64] and [layer.self_attn.o_proj.in_features for layer in model.model.layers][2] == 32


def test_an_old_bundle_is_whole_and_speaks() -> None:
    verify_files(OLD / "bundle")
    said = here("generate", OLD / "bundle", "The river", "--max-tokens", 8, "--json")
    assert "river" in said.stdout and json.loads(said.stdout)


def test_old_models_are_as_good_as_they_were_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OLD)  # rows are named by paths as given
    here("eval", "slim", "bundle", "--reference", "dense", "--text", "judge.txt", "--json", tmp_path / "quality.json")
    old, new = document(OLD / "quality.json"), document(tmp_path / "quality.json")
    assert [row["name"] for row in new["rows"]] == [row["name"] for row in old["rows"]] == ["dense", "slim", "bundle"]
    for before, now, tolerance in zip(old["rows"], new["rows"], (1e-4, 1e-4, 0.02), strict=True):
        assert now["nll"] == pytest.approx(before["nll"], abs=tolerance)  # int8 kernels differ between processors
        assert now["kl"] == pytest.approx(before["kl"], abs=tolerance)
    assert "same" in here("compare", OLD / "quality.json", tmp_path / "quality.json").stdout


def test_an_old_result_compares_with_itself_and_is_shown(tmp_path: Path) -> None:
    (measured,) = read_result(OLD / "result.json").measurements
    assert (measured.name, len(measured.samples), measured.n_gen) == ("bundle", 6, 64)
    assert "same" in here("compare", OLD / "result.json", OLD / "result.json", "--min-effect", 0.5).stdout
    here("report", OLD / "result.json", OLD / "quality.json", "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "bundle" in page and "AMD EPYC" in page and "slim" in page


def test_an_old_table_of_costs_prices_a_layer_and_a_pruning(tmp_path: Path) -> None:
    table = read_costs(OLD / "cost.json", shape_of(read_config(OLD / "dense")), bits=4, group_size=32)
    raw = document(OLD / "cost.json")["threads"][0]
    ms = {(cost["query_heads"], cost["kv_heads"]): cost["ms"] for cost in raw["attention"]}
    ms |= {cost["width"]: cost["ms"] for cost in raw["ffn"]}
    assert table.layer_ms(LayerSizes(4, 2, 96)) == pytest.approx(ms[4, 2] + ms[96])
    assert table.layer_ms(LayerSizes(2, 1, 48)) == pytest.approx(ms[2, 1] + (ms[32] + ms[64]) / 2)
    here("prune", OLD / "dense", "-o", tmp_path / "slim", "--method", "flap", "--speedup", "1.03",
         "--costs", OLD / "cost.json", "--calibration", OLD / "learn.jsonl")  # fmt: skip
    widths = [len(layer["ffn"]) for layer in document(tmp_path / "slim" / "saap.json")["plan"]["layers"]]
    now, dense = (raw["constant_ms"] + sum(ms[4, 2] + ms[width] for width in of) for of in (widths, [128] * 3))
    assert now * 1.03 <= dense


@pytest.mark.parametrize(("factor", "worse"), [(1.0, []), (3.0, ["decode"])])
def test_a_device_is_judged_by_an_old_baseline(factor: float, worse: list[str]) -> None:
    verdict = judged(factor)
    assert [check.what for check in verdict.worse] == worse
    # Two sessions were recorded then, which tell less than five: where they do not do, it says how to add some.
    assert verdict.exit_code == (1 if worse else 3)
    unclear = [check for check in verdict.checks if check.verdict == CANNOT_TELL]
    assert all("devices baseline --add" in (check.reason or "") for check in unclear) and (worse or unclear)


def judged(factor: float) -> DeviceTest:
    """A test of the very device, on which each token takes ``factor`` as long as when the baseline was recorded."""
    (baseline,) = read_baselines(OLD / "baselines", "bundle")
    runs = [slower(result, factor) for result in [*baseline.results, baseline.results[0]]]
    return retest(OLD / "baselines", "bundle", lambda plan: runs.pop(0))


def slower(result: Result, factor: float) -> Result:
    (measured,) = result.measurements
    samples = [replace(s, token_s=[factor * seconds for seconds in s.token_s]) for s in measured.samples]
    return replace(result, measurements=[replace(measured, samples=samples)])


# -- the same behaviour ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old() -> dict[str, Any]:
    """The record that 760273a made."""
    return document(OLD / "digests.json")


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record that today's code makes."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, OLD / "make.py", "record", OLD], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path_factory.mktemp("record"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MODELS)
def test_plan_is_the_same(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Structures and counts to the last one; prices nearly: sequences are scored two at a time now."""
    before, now = (record["models"][name]["plan"] for record in (old, new))
    for plan in (before, now):
        if plan["reasons"]:
            plan["reasons"].pop("weighed", None)  # attention is weighed with all else now
    same(before, now, exactly=rounds_alike(old, new))


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_same(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Byte for byte; where processor or library round in another way, each tensor nearly."""
    before, now = old["models"][name], new["models"][name]
    assert [tensor[:2] for tensor in now["tensors"].values()] == [tensor[:2] for tensor in before["tensors"].values()]
    assert list(now["tensors"]) == list(before["tensors"])
    for tensor, (kind, _, norm, *sums) in before["tensors"].items():
        tolerance = norm * (0.02 if kind == "uint8" else 1e-3)  # nibbles may fall to the other side of a half
        assert now["tensors"][tensor][2:] == pytest.approx([norm, *sums], rel=0, abs=tolerance), tensor
    if rounds_alike(old, new) and same_versions(old, new, "safetensors"):
        assert now["files"] == before["files"]


@pytest.mark.parametrize("name", ["cpu", "portable"])
def test_bundle_is_the_same(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Export computes nothing that processors round in different ways; another onnx may write a graph otherwise."""
    before, now = old["bundles"][name], new["bundles"][name]
    assert now["operators"] == before["operators"]
    assert now["files"]["model.onnx.data"] == before["files"]["model.onnx.data"]
    if same_versions(old, new, "onnx", "onnx-ir"):
        assert now["files"] == before["files"]


def test_gguf_files_are_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    if not same_versions(old, new, "gguf"):
        pytest.skip("another gguf writes another file")
    assert new["gguf"] == old["gguf"]


def test_the_comparison_sees_what_has_changed(old: dict[str, Any]) -> None:
    plan = old["models"]["flap"]["plan"]
    other = json.loads(json.dumps(plan))
    other["layers"][2]["ffn"][0] += 1
    with pytest.raises(AssertionError):
        same(plan, other, exactly=False)
    for name, off in (("price_nats", 1e-5), ("ratio", 1e-9)):
        same({name: 0.5}, {name: 0.5 * (1 + off)}, exactly=False)
        with pytest.raises(AssertionError):
            same({name: 0.5}, {name: 0.5 * (1 + off)}, exactly=True)


def rounds_alike(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return old["arithmetic"] == new["arithmetic"] and same_versions(old, new, "torch", "numpy", "scipy", "transformers")


def same_versions(old: dict[str, Any], new: dict[str, Any], *names: str) -> bool:
    return all(old["versions"][name] == new["versions"][name] for name in names)


PRICES = ("price", "dearest_", "cheapest_")


def same(old: Any, new: Any, *, exactly: bool, place: str = "plan") -> None:
    """Two JSON values; ``exactly`` False lets fractions differ by rounding, and True prices alone, by less."""
    assert type(old) is type(new), place
    if isinstance(old, dict):
        assert list(old) == list(new), place
        for name in old:
            same(old[name], new[name], exactly=exactly, place=f"{place}.{name}")
    elif isinstance(old, list):
        assert len(old) == len(new), place
        for index, pair in enumerate(zip(old, new, strict=True)):
            same(*pair, exactly=exactly, place=f"{place}[{index}]")
    elif isinstance(old, float) and (not exactly or place.rpartition(".")[2].startswith(PRICES)):
        assert math.isclose(old, new, rel_tol=1e-6 if exactly else 2e-3), place
    else:
        assert old == new, place
