"""The arithmetic, the cells and the resuming of the scripts that measure pruning."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_requirement import cost_file

import studies.prices.study as prices
import studies.pruning.bars as bars
import studies.pruning.seeds as seeds
import studies.speedup.study as speed
from bench.compare import compare_within
from bench.confirm import Confirmed
from bench.result import INVALID
from devices.probe import probe
from export.run import BundleScorer
from saap.architectures import shape_of
from saap.checkpoint import load_model, read_config
from saap.masking import masked, mean_nll
from saap.search import Module, Option
from saap.structures import LayerPlan, PrunePlan, whole_layer
from studies.pruning.study import options_of
from studies.speedup.rows import Setup, attempt_name, closest, next_asked, row_variants, show_rows, speed_of
from tests.bench_samples import measurement, result

IDS = torch.randint(320, (10, 24), generator=torch.Generator().manual_seed(2))
HELD = torch.randint(320, (3, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def judged(tiny_model):
    """The tiny model, and 20 of its options priced and measured."""
    directory = tiny_model(head_dim=32)
    model = load_model(directory)
    options = options_of({"ratio": 0.3})
    budget = options.requirement.budget(shape_of(model.config), read_config(directory))
    return model, prices.judged(model, IDS, HELD, options, budget, None, count=20, seed=1)


def test_options_of_all_types_and_depths_are_priced_and_measured(judged):
    model, record = judged
    shape = shape_of(model.config)
    counts = {}
    for point in record["points"]:
        counts[point["type"]] = counts.get(point["type"], 0) + 1
    # Three layers have one option each without a module, and one with fewer query heads in every group.
    assert counts == {"FFN width": 4, "KV groups": 4, "no FFN": 3, "no attention": 3, "query heads": 3}
    for kind in counts:
        assert {p["layer"] for p in record["points"] if p["type"] == kind} >= {0, 2}
    point = next(p for p in record["points"] if p["type"] == "no attention" and p["layer"] == 1)
    base = mean_nll(model, HELD)
    with masked(model, {1: LayerPlan((), (), whole_layer(shape.layers[1]).ffn)}, 32):
        assert point["alone"] == pytest.approx(mean_nll(model, HELD) - base, abs=1e-4)
    assert abs(point["alone"]) > 1e-3


def test_on_a_plan_a_module_counts_from_whole(tiny_model):
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    whole = [whole_layer(sizes) for sizes in shape.layers]
    kept = {width: LayerPlan((), (), tuple(range(width))) for width in (32, 64, 128)}
    plan = PrunePlan((prices.with_module(whole[0], "ffn", kept[64]), *whole[1:]))
    drawn = [("FFN width", Module(0, "ffn", ()), Option(kept[width], 1.0, 1.0)) for width in (32, 128)]
    base = mean_nll(model, HELD)
    with masked(model, {0: prices.with_module(whole[0], "ffn", kept[32])}, 16):
        quarter = mean_nll(model, HELD)
    found = prices.increases(model, shape, plan, drawn, HELD)
    assert found == pytest.approx([quarter - base, 0], abs=1e-5) and abs(quarter - base) > 1e-3


def test_rank_correlation_is_of_ranks():
    found = prices.rank_correlation([1, 2, 3, 4, 5, 6], [0.1, 0.2, 10, 20, 30, 300])
    assert found == {"rho": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1)}
    found = prices.rank_correlation([1, 2, 3, 4], [2, 1, 4, 3])
    assert found["rho"] == pytest.approx(1 - 6 * 4 / (4 * 15)) and found["low"] < found["rho"] < found["high"]
    assert prices.rank_correlation([1, 1, 1], [1, 2, 3]) == {"rho": None, "low": None, "high": None}


def test_variants_are_judged_by_the_same_options(tiny_model):
    directory = tiny_model()
    model, drawn = load_model(directory), []
    for variant in ({"score": "token"}, {"score": "vector", "corrections": 1}):
        options = options_of({**variant, "ratio": 0.3})
        budget = options.requirement.budget(shape_of(model.config), read_config(directory))
        record = prices.judged(model, IDS, HELD, options, budget, None, count=12)
        drawn.append([(p["layer"], p["type"], p["keep"]) for p in record["points"]])
    assert drawn[0] == drawn[1]


def timed(asked, speedup=None, **fields):
    return {"asked": asked, **({"speed": {"speedup": speedup}} if speedup else {}), **fields}


def test_what_is_asked_for_next():
    assert next_asked([], 1.25) == 1.25
    assert next_asked([timed(1.25)], 1.25) is None  # not timed yet
    assert next_asked([timed(1.25, 1.274)], 1.25) is None  # within 2 %
    assert next_asked([timed(1.25, 1.20)], 1.25) == pytest.approx(1.3021)
    assert next_asked([timed(1.25, 1.20), timed(1.3021, 1.28)], 1.25) == pytest.approx(1.2716)
    assert next_asked([timed(1.25, 1.1), timed(1.4, 1.6), timed(1.3, 1.1)], 1.25) is None  # the last try
    assert next_asked([timed(1.25, 1.20), timed(1.3021, refused="too much")], 1.25) is None


def test_the_closest_in_speed_counts():
    cells = [timed(1.5, 1.4), timed(1.6, 1.55), timed(1.58)]
    assert closest(cells, 1.5) is cells[1]
    assert closest([timed(1.5)], 1.5) is None


def live(slim, dense=(2.0, 2.2, 2.0, 2.1, 2.0, 2.4, 2.0, 2.0), **fields):
    """A comparison of a dense and a slim bundle that take so many milliseconds per token."""
    found = result(
        *[measurement(name, [1e-3 * t for t in side], **fields) for name, side in (("dense", dense), ("slim", slim))]
    )
    return Confirmed(compare_within(found, "dense", "slim"), [found])


def test_a_speed_is_the_median_of_pairs():
    found = speed_of(live([1.0, 1.1, 1.6, 1.05, 1.0, 1.2, 1.0, 1.0]))
    assert found["speedup"] == pytest.approx(2) and found["pairs"] == 8
    assert 1.25 <= found["low"] <= 2 <= found["high"] == pytest.approx(2)
    assert found["bench"]["speedup"] == pytest.approx(2) and found["ms"][1][2] == 1.6
    assert "INVALID" in speed_of(live([1.0] * 8, status=INVALID, reasons=["it throttled"]))
    assert "no pairs" in speed_of(live([1.0] * 7))


def test_every_row_and_attempt_has_a_name_of_its_own():
    rows = [{**row, "speedup": s, "seed": 0} for row in row_variants(published=True) for s in (1.25, 1.5)]
    names = {attempt_name(row, attempt) for row in rows for attempt in range(3)}
    assert len(rows) == 2 * (2 + 3 * 9) and len(names) == 3 * len(rows)
    assert "attempt=2_compensate=bias_method=flap_seed=0_speedup=1.25_text=alike" in names


class Texts:
    def of(self, variant):
        return IDS

    def test(self, count):
        return HELD[:count]


@pytest.fixture
def setup(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    costs = cost_file(tmp_path / "cost.json", device=probe())
    return Setup(tiny_model(), Texts(), costs, tmp_path / "cells", tmp_path / "bundles", chunks=3, pairs=8)


FLAP = {"method": "flap", "text": "alike", "compensate": "bias", "speedup": 1.3, "seed": 0}
SAAP = {"method": "saap", "compensate": "refit", "speedup": 1.3, "seed": 0}


def test_bundles_are_made_measured_and_not_made_again(setup, monkeypatch, capsys):
    speed.prune_rows(setup, [SAAP, FLAP])
    cells = {name: setup.cell(attempt_name(variant, 0)) for name, variant in (("saap", SAAP), ("flap", FLAP))}
    assert all(cell["planned"]["speedup"] >= 1.3 and cell["asked"] == 1.3 for cell in cells.values())
    assert cells["saap"]["bundle"]["hash"] != cells["flap"]["bundle"]["hash"]

    speed.quality_rows(setup, [SAAP, FLAP])
    bundle = BundleScorer(setup.bundles / attempt_name(FLAP, 0))
    nll = -bundle.logprobs(HELD.numpy()).mean()
    assert setup.cell(attempt_name(FLAP, 0))["quality"] == {"test3": pytest.approx(nll, rel=1e-5)}
    dense = setup.cell("dense")["quality"]["test3"]
    assert dense != pytest.approx(nll, rel=1e-4)

    monkeypatch.setattr("bench.confirm.compare_live", lambda *a, **k: live([1.6] * 8, dense=[2.0] * 8))
    speed.speed_rows(setup, [SAAP])  # 1.25, where 1.3 was asked for
    assert setup.cell(attempt_name(SAAP, 0))["speed"]["speedup"] == pytest.approx(1.25)
    assert "speed" not in setup.cell(attempt_name(FLAP, 0))

    speed.prune_rows(setup, [SAAP, FLAP])
    second = setup.cell(attempt_name(SAAP, 1))
    assert second["asked"] == pytest.approx(1.3 * 1.3 / 1.25) and second["planned"]["speedup"] >= second["asked"]
    assert setup.cell(attempt_name(FLAP, 1)) is None  # not timed yet
    show_rows(setup)
    told = capsys.readouterr().out.splitlines()
    (row,) = [line for line in told if line.startswith("| 1.3") and "method=saap" in line]
    assert "| 1.3 | 1.3" in row and "| 1.250x (1.250 to 1.250) |" in row

    monkeypatch.setattr(speed, "prune", None)  # nothing is pruned that is there
    speed.prune_rows(setup, [SAAP, FLAP])
    speed.quality_rows(setup, [SAAP, FLAP])


def test_a_bundle_that_is_gone_is_made_again_while_it_is_needed(setup, monkeypatch):
    speed.prune_rows(setup, [FLAP])
    name = attempt_name(FLAP, 0)
    first = setup.cell(name)
    shutil.rmtree(setup.bundles / name)
    speed.prune_rows(setup, [FLAP])
    assert setup.cell(name)["bundle"] == first["bundle"] and (setup.bundles / name / "bundle.json").is_file()
    setup.write(name, {**first, "quality": {"test3": 1.0}, "speed": {"speedup": 1.3}})
    shutil.rmtree(setup.bundles / name)
    monkeypatch.setattr(speed, "prune", None)
    speed.prune_rows(setup, [FLAP])
    assert not (setup.bundles / name).is_dir()


def test_the_same_bundle_is_measured_once(setup):
    first = speed.make_bundle(setup, FLAP, 0, 1.3)
    setup.write(attempt_name(FLAP, 0), {**first, "quality": {"test3": 5.0}, "speed": {"speedup": 1.2}})
    again = speed.make_bundle(setup, FLAP, 1, 1.3001)
    assert again["bundle"] == first["bundle"]
    assert (again["quality"], again["speed"], again["asked"]) == ({"test3": 5.0}, {"speedup": 1.2}, 1.3001)


def test_what_cannot_be_made_is_told_once(setup, monkeypatch):
    far = {**FLAP, "speedup": 50.0}
    speed.prune_rows(setup, [far])
    assert "the largest" in setup.cell(attempt_name(far, 0))["refused"]
    monkeypatch.setattr(speed, "prune", None)
    speed.prune_rows(setup, [far])


def test_a_table_of_another_machine_is_refused(setup, tmp_path):
    with pytest.raises(ValueError, match="this machine is"):
        speed.runtime_of(cost_file(tmp_path / "theirs.json"))
    with pytest.raises(ValueError, match=r"make it with `studies.speedup.study costs`"):
        speed.runtime_of(tmp_path / "none.json")


def test_one_seed_twice_writes_the_same_files(setup):
    options = options_of({"method": "saap", "ratio": 0.3})
    files = seeds.twice(setup.model_dir, IDS, options)
    assert bars.twice_bar({"files": files}).reached and "model.safetensors" in files[0]
    files[1]["model.safetensors"] = "0" * 64
    bar = bars.twice_bar({"files": files})
    assert bar.reached is False and "differ: ['model.safetensors']" in bar.found
