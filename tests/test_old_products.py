"""What old commits wrote still works, and today's code writes the same: ``tests/support/old/README.md``."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import torch
from support.command_line import here
from support.old_products import HOME, old_products
from transformers import AutoTokenizer

from bench.judge.baselines import read_baselines
from bench.judge.regression import DeviceTest, retest
from bench.judge.verdict import CANNOT_TELL
from bench.measure.result import Result, read_result
from export.bundle import Bundle
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.shape import LayerSizes
from saap.prune.search.layer_costs import read_costs

FAMILIES = ("lfm2", "qwen3_5_text", "gemma3_text", "gemma4_text")
PRUNED = ("ratio", "speedup", "max-bytes", "vocabulary", "flap", "shortgpt", *(f"{name}-slim" for name in FAMILIES))
TUNED = ("tuned", "tuned-max-bytes", "tuned-conversations", *(f"{name}-tuned" for name in FAMILIES))
MODELS = (*PRUNED, *TUNED)
PORTABLE = ("cpu", "portable")  # made of old models, which no arithmetic of today changes
BUNDLES = (*PORTABLE, "vocabulary-bundle", "max-bytes-bundle", *(f"{name}-bundle" for name in FAMILIES))
GRAPHS = ("model.onnx", "scoring.onnx")


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("SAAP_DATA", raising=False)


# -- old products ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["760273a", "1e82854a"])
def products(request: pytest.FixtureRequest) -> Path:
    """What a commit wrote."""
    return old_products(request.param)


WIDTHS = {"760273a": [128, 96, 64], "1e82854a": [96, 96, 64]}
HEADS = {"760273a": 32, "1e82854a": 64}


@pytest.mark.parametrize("name", ["slim", "tuned"])
def test_an_old_directory_loads_and_runs(name: str, products: Path) -> None:
    model = load_model(products / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(products / name)
    ids = tokenizer("The river holds the paper, 512.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape == (1, ids.shape[1], 320) and torch.isfinite(logits).all()
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == WIDTHS[products.name]
    assert model.model.layers[2].self_attn.o_proj.in_features == HEADS[products.name]


def test_an_old_bundle_is_whole_and_speaks(products: Path) -> None:
    Bundle.open(products / "bundle").check()
    answer = here("generate", products / "bundle", "The river", "--max-tokens", 8, "--json")
    assert "river" in answer.stdout and json.loads(answer.stdout)


def test_old_models_are_as_good_as_they_were_said_to_be(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(products)  # rows are named by paths as given
    here("eval", "slim", "bundle", "--reference", "dense", "--text", "judge.txt", "--json", tmp_path / "quality.json")
    old, new = document(products / "quality.json"), document(tmp_path / "quality.json")
    assert [row["name"] for row in new["rows"]] == [row["name"] for row in old["rows"]] == ["dense", "slim", "bundle"]
    for before, now, tolerance in zip(old["rows"], new["rows"], (1e-4, 1e-4, 0.02), strict=True):
        assert now["nll"] == pytest.approx(before["nll"], abs=tolerance)  # int8 kernels differ between processors
        assert now["kl"] == pytest.approx(before["kl"], abs=tolerance)
    assert "same" in here("compare", products / "quality.json", tmp_path / "quality.json").stdout


def test_an_old_result_compares_with_itself_and_is_shown(products: Path, tmp_path: Path) -> None:
    result, quality = products / "result.json", products / "quality.json"
    (measured,) = read_result(result).measurements
    assert (measured.name, len(measured.samples), measured.n_gen) == ("bundle", 6, 64)
    assert "same" in here("compare", result, result, "--min-effect", 0.5).stdout
    here("report", result, quality, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "bundle" in page and "AMD EPYC" in page and "slim" in page


def test_an_old_table_of_costs_prices_a_layer_and_a_pruning(products: Path, tmp_path: Path) -> None:
    table = read_costs(products / "cost.json", shape_of(read_config(products / "dense")), bits=4, group_size=32)
    raw = document(products / "cost.json")["threads"][0]
    ms = {(cost["query_heads"], cost["kv_heads"]): cost["ms"] for cost in raw["attention"]}
    ms |= {cost["width"]: cost["ms"] for cost in raw["ffn"]}
    assert table.layer_ms(LayerSizes(4, 2, 96)) == pytest.approx(ms[4, 2] + ms[96])
    assert table.layer_ms(LayerSizes(2, 1, 48)) == pytest.approx(ms[2, 1] + (ms[32] + ms[64]) / 2)
    here("prune", products / "dense", "-o", tmp_path / "slim", "--method", "flap", "--speedup", "1.01",
         "--costs", products / "cost.json", "--calibration", products / "learn.jsonl")  # fmt: skip
    widths = [len(layer["ffn"]) for layer in document(tmp_path / "slim" / "saap.json")["plan"]["layers"]]
    now, dense = (raw["constant_ms"] + sum(ms[4, 2] + ms[width] for width in of) for of in (widths, [128] * 3))
    assert now * 1.01 <= dense


@pytest.mark.parametrize(("factor", "worse"), [(1.0, []), (3.0, ["decode"])])
def test_a_device_is_judged_by_an_old_baseline(factor: float, worse: list[str], products: Path) -> None:
    verdict = judged(products / "baselines", factor)
    assert [check.what for check in verdict.worse] == worse
    unclear = [check for check in verdict.checks if check.verdict == CANNOT_TELL]
    # The sessions were recorded beside other work: where they do not do, it says how to add some.
    assert verdict.exit_code == (1 if worse else 3)
    assert all("devices baseline --add" in (check.reason or "") for check in unclear) and (worse or unclear)


def judged(baselines: Path, factor: float) -> DeviceTest:
    """A test of the very device, on which each token takes ``factor`` as long as when the baseline was recorded."""
    recorded = read_baselines(baselines, "bundle")
    (baseline,) = recorded
    runs = [slower(result, factor) for result in [*baseline.results, baseline.results[0]]]
    return retest(recorded, lambda plan: runs.pop(0))


def slower(result: Result, factor: float) -> Result:
    (measured,) = result.measurements
    samples = [replace(s, token_s=[factor * seconds for seconds in s.token_s]) for s in measured.samples]
    return replace(result, measurements=[replace(measured, samples=samples)])


# -- the same behaviour ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old() -> dict[str, Any]:
    """The record that 1e82854a made."""
    return digests_in((HOME / "digests.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record that today's code makes."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HOME / "make.py", "record", old_products()], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path_factory.mktemp("record"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return digests_in(done.stdout)


def digests_in(text: str) -> dict[str, Any]:
    """Read digests without what plans no longer say: the price of losing a quarter of a block."""
    return json.loads(text, object_hook=lambda fields: {k: v for k, v in fields.items() if k != "quarter"})


def pair(kind: str, name: str, old: dict[str, Any], new: dict[str, Any]) -> tuple[Any, Any]:
    """What both records have of one product."""
    if name not in new[kind]:
        pytest.skip(f"this transformers does not know {name.partition('-')[0]}")
    return old[kind][name], new[kind][name]


@pytest.mark.parametrize("name", MODELS)
def test_plan_is_the_same(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Structures and counts to the last one, prices nearly."""
    before, now = (model["plan"] for model in pair("models", name, old, new))
    assert not (lines := list(differences(before, now, exactly=rounds_alike(old, new)))), report(name, lines)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_same(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Byte for byte; where processor or library round in another way, each tensor nearly."""
    before, now = pair("models", name, old, new)
    lines = list(other_tensors(before["tensors"], now["tensors"], exactly=rounds_alike(old, new)))
    if not lines and rounds_alike(old, new) and same_versions(old, new, "safetensors"):
        lines = list(differences(before["files"], now["files"], exactly=True, place="file"))
    assert not lines, report(name, lines)


@pytest.mark.parametrize("name", BUNDLES)
def test_bundle_is_the_same(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Export computes nothing that processors round in different ways; another onnx may write a graph otherwise."""
    if name not in PORTABLE and not rounds_alike(old, new):
        pytest.skip("the model of this bundle was pruned or tuned by other arithmetic")
    before, now = pair("bundles", name, old, new)
    lines = [line for graph in GRAPHS for line in other_nodes(graph, before[graph], now[graph])]
    if same_versions(old, new, "onnx", "onnx-ir"):
        lines += differences(before, now, exactly=True, place=name)
    else:
        data = [record["files"]["model.onnx.data"] for record in (before, now)]
        lines += differences(*data, exactly=True, place="model.onnx.data")
    assert not lines, report(name, lines)


def test_gguf_files_are_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    if not same_versions(old, new, "gguf"):
        pytest.skip("another gguf writes another file")
    assert new["gguf"] == old["gguf"]


def test_the_comparison_sees_what_has_changed(old: dict[str, Any]) -> None:
    record = old["models"]["flap"]
    other = json.loads(json.dumps(record))
    assert not list(differences(record, other, exactly=True))
    other["plan"]["layers"][2]["ffn"][0] += 1
    (line,) = differences(record["plan"], other["plan"], exactly=False)
    assert line.startswith("plan.layers[2].ffn[0]: ")
    name = "model.layers.0.self_attn.k_proj.weight"
    sketch = other["tensors"][name]
    sketch[2] = "another hash"
    assert list(other_tensors(record["tensors"], other["tensors"], exactly=False)) == []
    assert list(other_tensors(record["tensors"], other["tensors"], exactly=True)) == [
        f"{name}: other bytes, about 0 of its norm away"
    ]
    sketch[4] += 0.1 * sketch[3]
    assert "0.035 of its norm away" in "".join(other_tensors(record["tensors"], other["tensors"], exactly=False))
    for key, off in (("price_nats", 1e-5), ("ratio", 1e-9)):
        values = {key: 0.5}, {key: 0.5 * (1 + off)}
        assert not list(differences(*values, exactly=False)) and list(differences(*values, exactly=True))


def rounds_alike(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return old["arithmetic"] == new["arithmetic"] and same_versions(old, new, "torch", "numpy", "scipy", "transformers")


def same_versions(old: dict[str, Any], new: dict[str, Any], *names: str) -> bool:
    return all(old["versions"][name] == new["versions"][name] for name in names)


def report(name: str, lines: list[str]) -> str:
    more = [f"and {len(lines) - 12} more"] if len(lines) > 12 else []
    return "\n".join([f"{name} is another than 1e82854a made (tests/support/old/README.md):", *lines[:12], *more])


def other_tensors(old: dict[str, Any], new: dict[str, Any], *, exactly: bool) -> Iterator[str]:
    """A line for each tensor of another type, shape or bytes; ``exactly`` False lets values differ by rounding."""
    yield from differences(list(old), list(new), exactly=True, place="tensors")
    for name in (name for name in old if name in new):
        (kind, shape, start, norm, *sums), now = old[name], new[name]
        if now[:2] != [kind, shape]:
            yield f"{name}: {kind}{shape} became {now[0]}{now[1]}"
            continue
        # Sums with random signs differ by about the norm of the difference.
        away = math.sqrt(sum((x - y) ** 2 for x, y in zip(sums, now[4:], strict=True)) / len(sums)) / (norm or 1.0)
        allowed = 0.02 if kind == "uint8" else 1e-3  # nibbles may fall to the other side of a half
        largest = max(abs(x - y) for x, y in zip([norm, *sums], now[3:], strict=True))
        if start != now[2] if exactly else largest > allowed * norm:
            yield f"{name}: other bytes, about {away:.2g} of its norm away"


def other_nodes(graph: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Operators that stand in a graph more or less often."""
    before, now = (Counter(node.split()[0] for node in each["nodes"]) for each in (old, new))
    for operator in sorted(before | now):
        if before[operator] != now[operator]:
            yield f"{graph}: {before[operator]} nodes {operator} became {now[operator]}"


PRICES = ("price", "dearest_", "cheapest_")


def differences(old: Any, new: Any, *, exactly: bool, place: str = "plan") -> Iterator[str]:
    """A line for each place where two JSON values differ.

    Args:
        exactly: False lets fractions differ by rounding, and True prices alone, by less.
        place: the name of the values.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            if name in old and name in new:
                yield from differences(old[name], new[name], exactly=exactly, place=f"{place}.{name}")
            else:
                yield f"{place}.{name} {'went' if name in old else 'is new'}"
        if old.keys() == new.keys() and list(old) != list(new):
            yield f"{place}: the names have another order"
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{place}: {len(old)} entries became {len(new)}"
        for index, values in enumerate(zip(old, new, strict=False)):
            yield from differences(*values, exactly=exactly, place=f"{place}[{index}]")
    elif type(old) is float and type(new) is float and (not exactly or place.rpartition(".")[2].startswith(PRICES)):
        if not math.isclose(old, new, rel_tol=1e-6 if exactly else 2e-3):
            yield f"{place}: {old} became {new}"
    elif type(old) is not type(new) or old != new:
        yield f"{place}: {old!r} became {new!r}"
