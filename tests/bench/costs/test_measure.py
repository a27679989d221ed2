import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench.costs import measure as costs
from bench.costs.fit import CostProcess, Stack, costs_from, fit_ratios, read_stacks
from bench.costs.measure import COSTS, CostsError, measure_costs, schedule, write_costs
from bench.costs.options import CostsOptions
from bench.costs.worker import LEAST_TURNS, SKIPPED, TURN, CostsJob, steps_in_turns, waiting_clock
from bench.measure.result import Bandwidth
from export.bundle.manifest import LayerSizes, read_manifest
from saap.base.errors import UserError

BANDWIDTH = Bandwidth(1, 1, [1e9])
QUICK = CostsOptions(threads=(1,), depth=20, rounds=1, seconds=0.0)

# A machine on which a block costs node + slope * size: 3 us + 2 us per query head + 1 us per KV head; 7 us + 10 ns per
# channel of FFN; and 500 us outside the layers.
FULL, LAYERS, FFN_NODES = LayerSizes(4, 2, 512), 10, 7


def microseconds(sizes: LayerSizes) -> float:
    attention = 3 + 2 * sizes.query_heads + sizes.kv_heads if sizes.query_heads else 0
    return attention + (7 + 0.01 * sizes.ffn if sizes.ffn else 0)


def stack(option: LayerSizes) -> Stack:
    changed = 0 if option == FULL else LAYERS // 2
    missing = (5 if not option.query_heads else 0) + (FFN_NODES if not option.ffn else 0)
    return Stack(option, changed, LAYERS, 150 - changed * missing, 1 << 20)


# 2 us for each thousand words that the head says.
WORDS, FEWER = 50_000, (10_000, 20_000)
OPTIONS = ((4, 2, 512), (4, 2, 0), (0, 0, 512), (4, 2, 64), (4, 2, 256), (1, 1, 512), (2, 1, 512), (2, 2, 512))
STACKS = [stack(LayerSizes(*option)) for option in OPTIONS] + [replace(stack(FULL), head_rows=rows) for rows in FEWER]
# In groups of 64 attention takes 0.9 of its time, an FFN 0.8, and a step 100 us less outside its layers. Half of the
# FFN's weights have 8 bits in the last one.
SHARES = {"attention": 0.9, "ffn": 0.8, "outside": 1.0}
FORMED = [replace(stack(FULL), part=part, bits=4, group_size=64) for part in SHARES]
FORMED.append(replace(stack(FULL), part="ffn", bits=8, group_size=128, share=0.5))


def step_ns(which: Stack) -> float:
    layers = which.changed * microseconds(which.option) + (LAYERS - which.changed) * microseconds(FULL)
    if which.part:
        own = microseconds(replace(FULL, ffn=0)) if which.part == "attention" else 7 + 0.01 * FULL.ffn
        layers -= LAYERS * own * (1 - SHARES[which.part]) + (100 if which.part == "outside" else 0)
    return 1000 * (400 + 0.002 * (which.head_rows or WORDS) + layers)


def processes(noise: float = 0.0, spoilt: int | None = None) -> list[CostProcess]:
    """Each process is slower by a factor of its own, and the first stack in it by 3 %."""
    drawn = random.Random(1)
    found = []
    for index, group in enumerate(schedule(len(STACKS), 8, 4)):
        pace = 1 + drawn.random()
        samples = []
        for place, which in enumerate(group):
            ns = step_ns(STACKS[which]) * pace * (1.03 if place == 0 else 1) * math.exp(drawn.gauss(0, noise))
            ns *= 3 if index == spoilt and which else 1
            samples.append([[round(ns) + 2000] * TURN] * LEAST_TURNS)
        found.append(CostProcess(group, samples, [[[2000] * TURN] * LEAST_TURNS] * len(group)))
    return found


def test_costs_are_what_the_parts_took() -> None:
    quiet = [CostProcess([*range(10)], [[[round(step_ns(s))] * 3] * 2 for s in STACKS], [[[0] * 3] * 2] * 10)]
    found = costs_from(STACKS, quiet, [0], BANDWIDTH)
    assert found.step_ms == pytest.approx(step_ns(STACKS[0]) / 1e6)
    assert found.constant_ms == pytest.approx(0.5, rel=1e-4)
    assert [(c.query_heads, c.kv_heads) for c in found.attention] == [(1, 1), (2, 1), (2, 2), (4, 2)]
    assert [c.ms for c in found.attention] == pytest.approx([0.006, 0.008, 0.009, 0.013], rel=1e-4)
    assert [c.width for c in found.ffn] == [64, 256, 512]
    assert [c.ms for c in found.ffn] == pytest.approx([0.00764, 0.00956, 0.01212], rel=1e-4)
    assert [(c.rows, round(c.ms, 4)) for c in found.head] == [(10_000, 0.42), (20_000, 0.44)]
    assert found.node_ms == pytest.approx(0.007 / FFN_NODES, rel=1e-3)
    assert found.forms == []


def test_costs_in_other_integers() -> None:
    stacks = [*STACKS, *FORMED]
    count = len(stacks)
    quiet = [CostProcess([*range(count)], [[[round(step_ns(s))] * 3] * 2 for s in stacks], [[[0] * 3] * 2] * count)]
    found = costs_from(stacks, quiet, [0], BANDWIDTH)
    assert [c.ms for c in found.attention] == pytest.approx([0.006, 0.008, 0.009, 0.013], rel=1e-4)
    larger, wider = found.forms
    assert (larger.bits, larger.group_size) == (4, 64)
    assert larger.attention_ms == pytest.approx(0.9 * 0.013, rel=1e-3)
    assert larger.ffn_ms == pytest.approx(0.8 * 0.01212, rel=1e-3)
    assert larger.outside_ms == pytest.approx(0.4, rel=1e-3)
    assert (wider.bits, wider.group_size, wider.attention_ms, wider.outside_ms) == (8, 128, None, None)
    assert wider.ffn_ms == pytest.approx(0.6 * 0.01212, rel=1e-3)  # if all of it had: 0.8 with half of it


@pytest.mark.parametrize(("noise", "spoilt", "within"), [(0.0, None, 1e-5), (0.005, 5, 0.015)])
def test_paces_of_processes_and_the_first_place_cancel(noise: float, spoilt: int | None, within: float) -> None:
    """A spoilt process hardly moves the ratios."""
    expected = [step_ns(s) / step_ns(STACKS[0]) for s in STACKS]
    assert fit_ratios(processes(noise, spoilt), len(STACKS)) == pytest.approx(expected, rel=within)


def test_a_clock_that_moves_from_turn_to_turn_cancels() -> None:
    drawn = random.Random(2)
    found = []
    for group in schedule(len(STACKS), 2, 4):
        paces = [1 + 0.5 * drawn.random() for _ in range(10)]
        samples = [[[round(1000 * step_ns(STACKS[i]) * pace)] * TURN for pace in paces] for i in group]
        found.append(CostProcess(group, samples, [[[0] * TURN] * len(paces)] * len(group)))
    expected = [step_ns(s) / step_ns(STACKS[0]) for s in STACKS]
    assert fit_ratios(found, len(STACKS)) == pytest.approx(expected, rel=1e-5)


def test_a_step_is_the_fast_one_without_its_time_in_the_run_queue() -> None:
    steps, waits = [9_000_000, *[9_500_000] * 9, 9_900_000], [4_000_000, *[0] * 9, 2_000_000]
    process = CostProcess([3, 0], [[steps], [[1_000_000] * 11]], [[waits], [[0] * 11]])
    assert process.step_ms(0) == 1.0
    assert process.step_ms(3) == pytest.approx(7.9)  # of 5.0, 7.9 and nine of 9.5


@pytest.mark.parametrize(
    ("waits_ns", "reason"),
    [([200_000, 200_000], None), ([0, 300_000], "1 thread: waited for a core 30% of the time (1 of 2 processes)")],
)
def test_a_table_of_processes_that_waited_for_a_core_is_invalid(
    bundles: list[Path], monkeypatch: pytest.MonkeyPatch, waits_ns: list[int], reason: str | None
) -> None:
    waits = iter(waits_ns)

    def process(job: CostsJob, group: list[int], *_: object) -> CostProcess:
        waited = next(waits)
        return CostProcess(group, [[[1_000_000] * TURN]] * len(group), [[[waited] * TURN]] * len(group))

    monkeypatch.setattr(costs, "probe_bandwidth", lambda cpus, cache: BANDWIDTH)
    monkeypatch.setattr(costs, "_process", process)
    table = measure_costs(bundles, CostsOptions(threads=(1,), rounds=2, depth=20))
    assert (table.status, table.reasons) == (("INVALID", [reason]) if reason else ("OK", []))


def test_every_round_times_each_stack_once_and_the_base_in_all_processes() -> None:
    groups = schedule(18, 3, 4)
    assert all(group.count(0) == 1 and len(group) <= 4 for group in groups)
    assert sorted(i for group in groups for i in group if i) == sorted([*range(1, 18)] * 3)
    assert len({group.index(0) for group in groups}) > 1  # the base is not always loaded first
    assert groups[:6] != groups[6:12]
    assert schedule(1, 2, 4) == [[0], [0]]


class World:
    """A clock, and a log of decoders that take a fixed time of it for a step."""

    def __init__(self) -> None:
        self.now, self.waited, self.log = 0, 0, []

    def decoder(self, name: str, ns: int) -> SimpleNamespace:
        def step(token_id: int) -> np.ndarray:
            self.now, self.waited = self.now + ns, self.waited + ns // 10
            return np.array([0.0, 1.0], np.float32)

        return SimpleNamespace(place=lambda length: self.log.append((name, length)), step=step)


def test_decoders_take_turns_forwards_and_backwards_at_one_depth() -> None:
    world = World()
    pair = [world.decoder("a", 100), world.decoder("b", 70)]
    taken = steps_in_turns(pair, 50, 0.0, lambda: world.now, lambda: world.waited)
    assert taken[0] == [[(100, 10)] * TURN] * LEAST_TURNS
    assert taken[1] == [[(70, 7)] * TURN] * LEAST_TURNS
    assert [name for name, _ in world.log] == ["a", "b", "b", "a"] * (LEAST_TURNS // 2)
    assert {length for _, length in world.log} == {50 - SKIPPED}
    taken = steps_in_turns([world.decoder("a", 1000)], 50, 100e-6, lambda: world.now)
    assert len(taken[0]) == 25  # of 4 us each, until the time is up
    assert taken[0][0][0] == (1000, 0)


def test_the_waiting_clock_reads_the_second_number_of_schedstat(tmp_path: Path) -> None:
    (tmp_path / "schedstat").write_text("123456 789 42\n")
    with waiting_clock(tmp_path / "schedstat") as waited:
        assert waited() == 789
    with waiting_clock(tmp_path / "none") as waited:
        assert waited() == 0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four stacks of a tiny model: whole, without FFN, without attention, and with a narrower FFN."""
    pytest.importorskip("onnx_ir")
    from export.graph.probe_model import read_probe_model
    from export.graph.probe_stacks import ProbeStack, write_probe_stacks
    from saap.models.shape import LayerSizes as Sizes

    root = tmp_path_factory.mktemp("stacks")
    config = {
        "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))
    (out := root / "out").mkdir()
    full = Sizes(4, 2, 128)
    options = [full, Sizes(4, 2, 0), Sizes(0, 0, 128), Sizes(4, 2, 32)]
    stacks = [ProbeStack([full, option, full, option]) for option in options]
    return write_probe_stacks(read_probe_model(root), out, stacks=stacks)


def test_stacks_are_read_from_their_manifests(bundles: list[Path]) -> None:
    stacks = read_stacks([read_manifest(path) for path in bundles])
    assert [(s.option, s.changed) for s in stacks] == [
        (LayerSizes(4, 2, 128), 0), (LayerSizes(4, 2, 0), 2), (LayerSizes(0, 0, 128), 2), (LayerSizes(4, 2, 32), 2),
    ]  # fmt: skip
    assert stacks[0].nodes - stacks[1].nodes == 2 * FFN_NODES
    assert stacks[0].nodes - stacks[2].nodes == 2 * 4  # norm, qkv, attention, o


def test_a_real_probe_writes_costs_with_their_raw_steps(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "probe_bandwidth", lambda cpus, cache: BANDWIDTH)
    seen: list[tuple[float, float]] = []
    document = measure_costs(bundles, QUICK, progress=lambda _, done, total: seen.append((done, total)))
    write_costs(tmp_path / "new" / "cost.json", document)
    assert COSTS.read(tmp_path / "new" / "cost.json") == document
    read = json.loads((tmp_path / "new" / "cost.json").read_text())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cost.json"] and seen == [(0, 1), (1, 1)]
    (table,) = read["threads"]
    assert (read["kind"], read["schema"], read["depth"], table["n_threads"]) == ("saap costs", 1, 20, 1)
    assert read["model"] == {
        "model_type": "llama", "hidden": 64, "head_dim": 16, "vocab": 128, "bits": 4, "block": 32, "head_bits": 4,
        "kv_dtype": "float32",
    }  # fmt: skip
    (process,) = table["processes"]
    assert sorted(process["stacks"]) == [0, 1, 2, 3]
    steps = np.array(process["samples_ns"])
    assert steps.shape == (4, LEAST_TURNS, TURN) and steps.min() > 1000
    assert 0 < table["step_ms"] < 1000 and table["bandwidth"]["samples"] == [1e9]
    assert [(c["query_heads"], c["kv_heads"]) for c in table["attention"]] == [(4, 2)]
    assert [c["width"] for c in table["ffn"]] == [32, 128]
    assert read["device"]["fingerprint"] and read["versions"]["onnxruntime"]


def test_what_cannot_be_measured_is_refused(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CostsError, match="a depth of 57 cannot be probed with this model: give 2 to 56"):
        measure_costs(bundles, replace(QUICK, depth=57))
    with pytest.raises(UserError, match="threads cannot be used"):
        measure_costs(bundles, replace(QUICK, threads=(1024,)))
    with pytest.raises(UserError, match="rounds 0 is not allowed: give a whole number from 1"):
        measure_costs(bundles, replace(QUICK, rounds=0))
    monkeypatch.setattr(costs.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(CostsError, match="MB of memory and 0 MB are free"):
        measure_costs(bundles, QUICK)


def test_a_worker_that_fails_is_one_line(bundles: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "bundle.json").write_text((bundles[1] / "bundle.json").read_text())
    with pytest.raises(CostsError, match=r"the process that times the operators failed .*is missing") as error:
        measure_costs([bundles[0], broken, bundles[2]], QUICK)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize(("free", "together"), [(10_000, 4), (1400, 2), (1600, 3)])
def test_as_many_stacks_share_a_process_as_half_the_memory_holds(
    monkeypatch: pytest.MonkeyPatch, free: int, together: int
) -> None:
    monkeypatch.setattr(costs.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert costs._stacks_together(100) == together
