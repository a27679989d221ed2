"""Ratios of models that stay loaded and take turns: real workers, and statistics of made-up loads."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_graphs import tiny_bundle

from bench.judge.comparison import compare_within
from bench.measure import run as bench_run
from bench.measure.bursts import take_bursts
from bench.measure.options import BenchOptions
from bench.measure.result import INVALID, LEAST_LOADS, Bursts, Load, read_result, write_result
from bench.measure.rounds import job_of
from bench.measure.run import measure
from bench.measure.statistics import ratio_of_loads
from bench.runtimes.peers import read_peers
from export.engine import turns
from export.engine.process import WORKER
from saap.base.child import ChildFailedError, Resident

PLAN = BenchOptions(threads=1, prompt=4, generate=12, warmup=2, repetitions=3, cold=False, ratio_time_s=60)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bundles")
    return [str(tiny_bundle(folder / name, seed=seed)) for seed, name in enumerate(("a", "b"))]


@pytest.fixture(autouse=True)
def short_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LOAD_S", 0.05)
    monkeypatch.setattr(turns, "BURST_S", 0.001)
    monkeypatch.setattr(turns, "MOST_LOADS", 4)


def test_all_take_the_same_turns_and_their_ratio_stands_where_a_measurement_is_invalid(
    bundles: list[str], tmp_path: Path
) -> None:
    result = measure(bundles, PLAN)
    (found,) = result.bursts
    assert found.failure is None and found.names == ["a", "b"]
    assert [load.order for load in found.loads] == [[0, 1], [1, 0], [1, 0], [0, 1]]
    for load in found.loads:
        counts = {len(seconds) for seconds in load.token_s}
        assert len(counts) == 1 and counts.pop() >= 2 and len(load.prefill_s[0]) == len(load.prefill_s[1]) >= 1
    write_result(tmp_path / "r.json", result)
    again = read_result(tmp_path / "r.json")
    assert again == result
    invalid = replace(again, measurements=[replace(m, status=INVALID) for m in again.measurements])
    (row,) = compare_within(invalid, "a", "b").rows
    known = found.ratio("a", "b", "decode")
    assert known and (row.ratio, row.low, row.high, row.test) == (known.ratio, known.low, known.high, "bursts")
    assert found.ratio("a", "b", "prefill")
    (without,) = compare_within(replace(invalid, bursts=[]), "a", "b").rows
    assert without.ratio is None and "INVALID" in str(without.reason)


def test_damaged_turns_are_named(bundles: list[str], tmp_path: Path) -> None:
    def told(load: Load) -> str:
        result = measure(bundles[:1], replace(PLAN, repetitions=1))
        write_result(tmp_path / "r.json", replace(result, bursts=[Bursts(["a", "b"], 4, 12, 0, 1, [load])]))
        with pytest.raises(Exception, match=r"r\.json") as error:
            read_result(tmp_path / "r.json")
        return str(error.value)

    assert "order" in told(Load([0, 0], [[], []], [[1.0], [1.0]]))
    assert "turns" in told(Load([0, 1], [[], []], [[1.0], [1.0, 2.0]]))


def test_a_worker_that_ends_is_told_and_none_is_left(bundles: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    peers = read_peers([*bundles, bundles[0]], PLAN.positions)
    began: list[int] = []
    ask = Resident.ask

    def note(self: Resident, document: dict[str, object]) -> dict[str, object]:
        began.append(self._process.pid)
        if len(began) == 8:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
        return ask(self, document)

    monkeypatch.setattr(Resident, "ask", note)
    found = take_bursts(peers, PLAN.settings()[0], PLAN)
    assert found.failure and "SIGKILL" in found.failure and found.ratio("a", "b", "decode") is None
    assert not [pid for pid in set(began) if Path(f"/proc/{pid}").exists()]


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_worker_that_rests_ends_with_its_parent(bundles: list[str]) -> None:
    peers = read_peers(bundles[:1], PLAN.positions)
    job = json.dumps(asdict(job_of(peers[0], PLAN.settings()[0], PLAN, peers[0].vocab_size)))
    program = (
        "import json, time; from saap.base.child import Resident\n"
        f"with Resident({WORKER!r}, 60, {{}}) as worker:\n"
        f"    worker.ask(json.loads({job!r})); worker.rest(); print(worker._process.pid, flush=True); time.sleep(60)\n"
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    worker = Path("/proc") / parent.stdout.readline().strip()
    assert worker.exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while worker.exists() and " Z" not in (worker / "stat").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not worker.exists() or " Z" in (worker / "stat").read_text()


def test_what_is_too_large_or_too_slow_for_turns_says_so(
    bundles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, (setting,) = read_peers(bundles, PLAN.positions), PLAN.settings()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 200000 kB\nMemAvailable: 100000 kB\n")
    found = take_bursts(peers, setting, replace(PLAN, root=tmp_path))
    assert not found.loads and "all at once need about" in str(found.failure)
    found = take_bursts(peers, setting, replace(PLAN, ratio_time_s=0.01))
    assert "give --ratio-time" in str(found.failure) and found.ratio("a", "b", "decode") is None
    monkeypatch.setattr(bench_run, "take_bursts", lambda *_: pytest.fail("none were asked for"))
    assert measure(bundles, replace(PLAN, ratio_time_s=None)).bursts == []


def test_there_are_enough_loads_for_an_interval(bundles: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads filled the time that a quick look had: no ratio came of them."""
    clock = itertools.count(0, 3)
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(turns, "MOST_LOADS", 60)
    monkeypatch.setattr(turns, "one_load", lambda _, order, *__: Load(order, [[], []], [[], []]))
    peers, (setting,) = read_peers(bundles, PLAN.positions), PLAN.settings()
    assert len(take_bursts(peers, setting, replace(PLAN, ratio_time_s=10)).loads) == LEAST_LOADS
    assert len(take_bursts(peers, setting, replace(PLAN, ratio_time_s=60)).loads) > LEAST_LOADS


def test_being_loaded_later_cancels_and_the_interval_holds_the_truth() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        later = [bool(n % 2) for n in range(8)]
        values = [np.log(1.1) + 0.03 * (1 if late else -1) + random.normal(0, 0.01) for late in later]
        found = ratio_of_loads(values, later)
        held += found.low <= 1.1 <= found.high
    assert 0.92 < held / 400 < 0.98
    exact = ratio_of_loads([0.03, -0.03, 0.03, -0.03], [True, False, True, False])
    assert exact.ratio == pytest.approx(1) and exact.p_value == 1.0


def test_a_child_that_does_not_answer_is_named() -> None:
    with Resident("saap.base.child", 5, {}) as worker, pytest.raises(ChildFailedError):
        worker.ask({"modules": 1})
