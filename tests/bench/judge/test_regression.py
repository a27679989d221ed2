from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support.bench_samples import measurement, result
from support.command_line import here, refused
from support.tiny_graphs import tiny_bundle

from bench.judge.baselines import BlindBaselineError, read_baselines, write_baseline
from bench.judge.regression import (
    DeviceTest,
    NoBaselineError,
    Recording,
    RegressionError,
    keep_tested,
    plan_of,
    record,
    retest,
    visible_changes,
)
from bench.judge.verdict import CANNOT_TELL, NOT_COMPARABLE, SAME, UNKNOWN, WORSE
from bench.measure.options import BenchOptions
from bench.measure.result import INVALID, WARN, Bursts, Energy, Load, Result, write_result
from bench.measure.run import measure
from bench.report.verdicts import device_junit
from export.bundle.manifest import read_manifest
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import Engine, EngineOptions
from export.engine.scoring import BundleScorer
from export.engine.worker import continued
from saap.cli.bench import show_reasons

TEXT = tuple(range(3, 23))
PLAN = BenchOptions(prompt=8, generate=4, threads=1, text=TEXT)
TOKENS = list(range(16))
FIVE = (1.0,) * 5
NOISE = np.random.default_rng(7).normal(1.0, 0.01, 400)  # recorded once: 1 % between processes


class Device:
    """Stands in for a run on a device: each gives the next of ``scales``, by which decode takes longer.

    Fields of a sample that are numbers wobble; ``joules`` is of a sensor.
    """

    fingerprint = "a" * 16
    once = False  # whether only the first run gives other tokens

    def __init__(
        self, *scales: float, tokens: Sequence[int] = TOKENS, nll: float | None = 2.5, joules: float | None = None,
        scope: str = "module_input", samples: dict[str, float] | None = None, **fields: object,
    ) -> None:  # fmt: skip
        self.scales, self.asked, self.fields = list(scales), list[BenchOptions](), fields
        self.answers = {"tokens": list(tokens), "nll": nll}
        self.samples, self.joules, self.scope = samples or {}, joules, scope
        self.noise = iter(NOISE[len(scales) :])  # other processes, other noise

    def __call__(self, plan: BenchOptions) -> Result:
        self.asked.append(plan)
        if self.once and len(self.asked) > 1:
            self.answers["tokens"] = TOKENS
        scale = self.scales.pop(0)
        m = measurement("tiny", [0.01 * scale * next(self.noise) for _ in range(10)], **self.fields)
        m = replace(m, samples=[replace(s, **self.sample()) for s in m.samples])
        settings = {"seed": 0, "repetitions": None, "text": list(plan.text), "answers": {"tiny": dict(self.answers)}}
        return result(m, fingerprint=self.fingerprint, settings=settings)

    def sample(self) -> dict[str, object]:
        wobble = next(self.noise)
        numbers = {"load_s": 0.5, "prefill_s": 0.2, "peak_decode_bytes": 120_000_000, **self.samples}
        energy = self.joules and Energy(self.joules * next(self.noise), 0.04, None, self.scope, "ina3221", 10.0)
        wobbly = {name: value * wobble for name, value in numbers.items()}
        return {**wobbly, "peak_decode_bytes": int(wobbly["peak_decode_bytes"]), "energy": energy}


class Named(Device):
    """One whose model has another name."""

    def __init__(self, name: str, *scales: float) -> None:
        super().__init__(*scales)
        self.name = name

    def __call__(self, plan: BenchOptions) -> Result:
        told = super().__call__(plan)
        answers = {self.name: told.settings["answers"]["tiny"]}
        (m,) = told.measurements
        return replace(told, measurements=[replace(m, name=self.name)], settings=told.settings | {"answers": answers})


def recorded(folder: Path, device: Device | None = None) -> Path:
    """A folder with the baseline of a device."""
    write_baseline(folder, record("tiny", device or Device(*FIVE), PLAN))
    return folder


def guarded(folder: Path, device: Device) -> DeviceTest:
    """A test of ``device`` against a baseline of an ordinary one, which has a sensor where this one has."""
    ordinary = Device(*FIVE, joules=None if device.joules is None else 1.0)
    return retest(read_baselines(recorded(folder, ordinary), "tiny"), device)


def verdicts(verdict: DeviceTest) -> dict[str, str]:
    return {check.what: check.verdict for check in verdict.checks}


def test_a_device_against_itself_flags_nothing(tmp_path: Path) -> None:
    device = Device(1.0)
    verdict = guarded(tmp_path, device)
    assert not verdict.worse and verdict.exit_code == 0 and len(device.asked) == 1
    told = verdicts(verdict)
    assert told.pop("energy") == UNKNOWN and set(told.values()) == {SAME}


def test_no_noise_of_that_size_is_taken_for_a_change(tmp_path: Path) -> None:
    recorded(tmp_path)
    for seed in range(20):
        device = Device(1.0, 1.0, 1.0)
        device.noise = iter(np.random.default_rng(100 + seed).normal(1.0, 0.02, 400))
        assert not retest(read_baselines(tmp_path, "tiny"), device).worse, seed


@pytest.mark.parametrize(("waited", "verdict"), [(0.4, CANNOT_TELL), (0.01, WORSE)])
def test_a_slow_down_in_which_others_held_the_cores_is_not_the_bundle_s(
    tmp_path: Path, waited: float, verdict: str
) -> None:
    device = Device(1.6, 1.6, 1.6)
    sample = device.sample
    device.sample = lambda: {**sample(), "counters": {"wait_share": waited}}  # type: ignore[method-assign]
    told = {check.what: check for check in guarded(tmp_path, device).checks}
    assert told["decode"].verdict == verdict
    assert ("waited for a core 40% of the time, 0% in the baseline" in str(told["decode"].reason)) == (
        verdict == CANNOT_TELL
    )


def test_what_differs_from_session_to_session_is_no_change(tmp_path: Path) -> None:
    """Sessions that lie 4 % apart: 5 % is neither there nor excluded, which says how much would be seen."""
    recorded(tmp_path, Device(0.96, 1.0, 1.05, 0.98, 1.01))
    device = Device(1.05, 1.0, 1.04)
    verdict = retest(read_baselines(tmp_path, "tiny"), device)
    (decode,) = [check for check in verdict.checks if check.what == "decode"]
    assert (decode.verdict, verdict.exit_code, len(device.asked)) == (CANNOT_TELL, 3, 3)
    assert decode.visible is not None and 0.06 < decode.visible < 0.15
    assert "5 sessions and 3 of now would show" in (decode.reason or "") and "--add" in (decode.reason or "")
    assert retest(read_baselines(tmp_path, "tiny"), Device(1.3, 1.3, 1.3)).worse


def test_a_change_of_the_size_that_matters_is_hardly_ever_the_same(tmp_path: Path) -> None:
    random, told = np.random.default_rng(3), []
    for _ in range(20):
        baseline = record("tiny", Device(*random.normal(1.0, 0.01, 5)), PLAN)
        write_baseline(tmp_path, baseline)
        checks = retest(read_baselines(tmp_path, "tiny"), Device(*random.normal(1.05, 0.01, 3))).checks
        told += [check.verdict for check in checks if check.what == "decode"]
    assert told.count(SAME) <= 1 and WORSE in told and CANNOT_TELL in told


def test_sessions_are_added_by_hand_and_by_good_tests(tmp_path: Path) -> None:
    waited: list[float] = []
    how = Recording(sessions=3, spread_s=60, sleep=waited.append)
    baseline = record("tiny", Device(*FIVE), PLAN, how)
    assert [round(seconds) for seconds in waited] == [30, 60] and set(visible_changes(baseline)) == {
        "decode",
        "prefill",
    }
    more = record("tiny", Device(*FIVE), plan_of(baseline), Recording(sessions=2, add_to=baseline))
    assert len(more.results) == 5 and more.results[:3] == baseline.results
    write_baseline(tmp_path, more)
    test = retest(read_baselines(tmp_path, "tiny"), Device(1.0))
    keep_tested(tmp_path, test)
    (kept,) = read_baselines(tmp_path, "tiny")
    assert len(kept.results) == 6 and kept.tested == 1 and kept.results[:5] == more.results
    keep_tested(tmp_path, retest(read_baselines(tmp_path, "tiny"), Device(1.2, 1.2, 1.2)))
    assert read_baselines(tmp_path, "tiny") == [kept]
    crowded = kept.with_tested(test.results * 40, 30)
    assert len(crowded.results) == 30 and crowded.tested == 25 and crowded.results[:5] == more.results
    full = replace(more, results=more.results * 7).with_tested(test.results, 30)
    assert len(full.results) == 35 and full.tested == 0
    fickle = Device(1.0, tokens=[5, *TOKENS[1:]])
    with pytest.raises(RegressionError, match="does not answer as its baseline does"):
        record("tiny", fickle, PLAN, Recording(sessions=1, add_to=baseline))


def test_a_test_measures_with_the_settings_of_its_baseline() -> None:
    plan = replace(PLAN, provider="cuda", warmup=3, seed=4, repetitions=6)
    device = Device(*FIVE, provider="cuda")
    baseline = record("tiny", device, plan)
    settings = {name: getattr(plan, name) for name in ("seed", "repetitions", "warmup")}
    told = [replace(result, settings=result.settings | settings) for result in baseline.results]
    assert plan_of(replace(baseline, results=told)) == replace(plan, cold=False)


def test_a_changed_model_is_told_from_a_changed_device(tmp_path: Path) -> None:
    """Where the bundle of the baseline is still there, both are measured in turns, now."""
    then = tiny_bundle(tmp_path / "then")
    content = read_manifest(then).content_hash
    baseline = record("tiny", Device(*FIVE, spec=str(then), bundle_hash=content), PLAN)
    write_baseline(tmp_path, baseline)
    asked: list[tuple[str, BenchOptions]] = []

    def beside(*ratios: float) -> Callable[[str, BenchOptions], Result]:
        left = list(ratios)

        def measure_both(old: str, plan: BenchOptions) -> Result:
            asked.append((old, plan))
            ratio = left.pop(0)
            loads = [
                Load(
                    [0, 1][:: (-1) ** n], [[0.1] * 3, [0.1 * ratio] * 3], [[0.01] * 9, [(0.01 + 1e-5 * n) * ratio] * 9]
                )
                for n in range(6)
            ]
            turns = Bursts(["then", "now"], plan.prompt, plan.generate, 0, 1, loads)
            sides = [measurement(name, [0.01] * 3, n_prompt=8, n_gen=4) for name in ("then", "now")]
            return result(*sides, bursts=[turns])

        return measure_both

    def told(device: Device, *ratios: float) -> tuple[dict[str, str], int]:
        found = retest(read_baselines(tmp_path, "tiny"), device, beside=beside(*ratios))
        return {check.what: check.verdict for check in found.checks if "both now" in check.what}, found.exit_code

    other = {"spec": "now", "bundle_hash": "f" * 64}
    same = {"decode, both now": SAME, "prefill, both now": SAME}
    assert told(Device(1.0, **other), 1.001) == (same, 0)
    assert asked[0][0] == str(then) and asked[0][1].ratio_time_s == 60
    assert told(Device(1.2, 1.2, 1.2, **other), 1.0) == (same, 1)  # it is the device
    worse = {"decode, both now": WORSE, "prefill, both now": WORSE}
    assert told(Device(1.2, 1.2, 1.2, **other), 1.2, 1.2) == (worse, 1)
    assert told(Device(1.0, **other), 1.2, 1.0) == (same, 0)  # a second time it is not
    assert told(Device(1.0, spec=str(then), bundle_hash=content)) == ({}, 0)  # the same bundle
    tiny_bundle(then, seed=1)
    assert told(Device(1.0, **other)) == ({}, 0)  # there is no telling what it was


def test_names_that_differ_have_files_that_differ(tmp_path: Path) -> None:
    for name in ("a.b", "a_b", "a b", "a/b"):
        write_baseline(tmp_path, record(name, Named(name, *FIVE), PLAN))
    assert len(list(tmp_path.iterdir())) == 4
    assert [read_baselines(tmp_path, name)[0].name for name in ("a.b", "a_b", "a b")] == ["a.b", "a_b", "a b"]
    older = tmp_path / f"v1_5.{'a' * 16}.json"  # as it was named once
    made = write_baseline(tmp_path, record("v1.5", Named("v1.5", *FIVE), PLAN))
    made.rename(older)
    assert read_baselines(tmp_path, "v1.5")
    write_baseline(tmp_path, read_baselines(tmp_path, "v1.5")[0])
    assert made.is_file() and not older.exists()


@pytest.mark.parametrize(
    ("device", "worse"),
    [
        ({"tokens": [1, *TOKENS[1:]]}, ["greedy tokens"]),
        ({"nll": 2.519}, []),
        ({"nll": 2.53}, ["NLL"]),
        ({"nll": float("nan")}, ["NLL"]),
        ({"nll": None}, ["NLL"]),
        ({"nll": 2.4}, []),
        ({"samples": {"peak_decode_bytes": 140e6}}, ["peak memory, decode"]),
        ({"samples": {"peak_load_bytes": 120e6}}, ["peak memory, load"]),
        ({"samples": {"load_s": 0.8}}, ["load"]),
        ({"samples": {"prefill_s": 0.23}}, ["prefill"]),
        ({"joules": 1.0}, []),
        ({"joules": 1.3}, ["energy"]),
    ],
)
def test_each_quantity_is_guarded_and_nothing_else_is_worse(tmp_path: Path, device: dict, worse: list[str]) -> None:
    verdict = guarded(tmp_path, Device(1.0, 1.0, 1.0, **device))
    assert [check.what for check in verdict.worse] == worse
    if "joules" in device:
        assert verdicts(verdict)["energy"] == (WORSE if worse else SAME)


def test_a_planted_slow_down_and_a_planted_token_are_caught(tmp_path: Path) -> None:
    device = Device(1.10, 1.10, 1.10, tokens=[*TOKENS[:5], 77, *TOKENS[6:]])
    verdict = guarded(tmp_path, device)
    decode, tokens = verdict.worse
    assert (decode.what, decode.confirmed) == ("decode", True) and decode.ratio == pytest.approx(1.10, abs=0.02)
    assert tokens.what == "greedy tokens" and tokens.reason == "token 6 of 16 is 77, it was 5" and tokens.confirmed
    assert verdict.exit_code == 1 and len(device.asked) == 3


def test_one_that_a_second_run_does_not_confirm_is_none(tmp_path: Path) -> None:
    device = Device(1.10, 1.0, 1.0, tokens=[9, *TOKENS[1:]])
    device.once = True
    verdict = guarded(tmp_path, device)
    told = {check.what: check for check in verdict.checks}
    assert told["decode"].verdict in (SAME, CANNOT_TELL) and not verdict.worse
    tokens = told["greedy tokens"]
    assert tokens.verdict == SAME and tokens.confirmed is False and "did not confirm" in (tokens.reason or "")


def test_energy_of_another_sensor_is_not_judged(tmp_path: Path) -> None:
    verdict = guarded(tmp_path, Device(1.0, joules=3.0, scope="wall"))
    (check,) = [c for c in verdict.checks if c.what == "energy"]
    told = "another sensor: ina3221 (module_input) then, ina3221 (wall) now"
    assert (check.verdict, check.reason) == (UNKNOWN, told)


def test_an_invalid_run_is_not_comparable(tmp_path: Path) -> None:
    verdict = guarded(tmp_path, Device(1.0, 1.0, 1.0, status=INVALID, reasons=["the host swapped"]))
    assert verdict.exit_code == 3 and "the host swapped" in (verdict.checks[0].reason or "")
    assert verdicts(verdict) == {"measurement": NOT_COMPARABLE, "greedy tokens": SAME, "NLL": SAME}


def test_a_run_that_is_invalid_still_tells_other_answers(tmp_path: Path) -> None:
    """They do not depend on time, and a noisy host must not hide a broken model."""
    others = [*TOKENS[:3], 99, *TOKENS[4:]]
    device = Device(*FIVE, 1.0, tokens=others, status=INVALID, reasons=["the host swapped"])
    verdict = guarded(tmp_path, device)
    assert verdict.exit_code == 1 and len(device.asked) == 6  # twice, each three times
    (worse,) = verdict.worse
    assert (worse.what, worse.confirmed) == ("greedy tokens", True)
    assert verdicts(verdict)["measurement"] == NOT_COMPARABLE


def test_a_second_run_that_is_invalid_leaves_it_open(tmp_path: Path) -> None:
    class Spoilt(Device):
        def __call__(self, plan: BenchOptions) -> Result:
            self.fields = {"status": INVALID, "reasons": ["hot"]} if self.asked else {}
            return super().__call__(plan)

    verdict = guarded(tmp_path, Spoilt(1.10, 1.10, 1.1, 1.1, 1.1, 1.1, 1.1))
    assert verdict.exit_code == 3 and verdict.checks[0].reason == "the new measurement is INVALID: hot"


def test_a_second_run_without_a_sensor_leaves_it_open(tmp_path: Path) -> None:
    class Unplugged(Device):
        def sample(self) -> dict[str, object]:
            return {**super().sample(), **({"energy": None} if len(self.asked) > 1 else {})}

    verdict = guarded(tmp_path, Unplugged(1.0, 1.0, joules=1.3))
    assert verdicts(verdict)["energy"] == UNKNOWN and not verdict.worse


def test_a_device_that_changes_before_the_second_run_confirms_nothing(tmp_path: Path) -> None:
    class Switched(Device):
        def __call__(self, plan: BenchOptions) -> Result:
            self.fingerprint = "ab"[len(self.asked)] * 16
            return super().__call__(plan)

    with pytest.raises(NoBaselineError, match="the device changed between two sessions"):
        guarded(tmp_path, Switched(1.10, 1.10))


def test_an_invalid_run_is_no_baseline() -> None:
    device = Device(1.0, 1.0, 1.0, status=INVALID, reasons=["hot"])
    with pytest.raises(RegressionError, match=r"session 1 is INVALID, so it is no baseline: hot \(3 times in a row\)"):
        record("tiny", device, PLAN)
    assert len(device.asked) == 3


def test_sessions_that_differ_more_than_the_effect_are_no_baseline() -> None:
    unlike = (1.0, 1.3, 0.8, 1.2, 0.9)
    with pytest.raises(BlindBaselineError, match=r"a change of decode \d+%.*5% is asked for.*--sessions") as refusal:
        record("tiny", Device(*unlike), PLAN, Recording(5, min_effect=0.05))
    assert refusal.value.exit_code == 3
    assert record("tiny", Device(*unlike), PLAN, Recording(5, min_effect=2.0)).results
    assert record("tiny", Device(*FIVE), PLAN, Recording(5, min_effect=0.05)).results


def test_a_reason_of_several_sessions_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = [[f"waited for a core {share}% of the time"] for share in (21, 22, 23)]
    show_reasons(*(result(measurement("tiny", FIVE, status=WARN, reasons=some)) for some in reasons))
    assert capsys.readouterr().out == "  tiny, pp8+tg4: WARN: waited for a core 21% of the time, in 3 of 3 runs\n"


def test_a_run_that_is_invalid_once_is_measured_again() -> None:
    class Hot(Device):
        def __call__(self, plan: BenchOptions) -> Result:
            self.fields = {"status": INVALID, "reasons": ["hot"]} if len(self.asked) == 1 else {}
            return super().__call__(plan)

    device, heard = Hot(1.0, 5.0, 1.0), list[str]()
    baseline = record("tiny", device, PLAN, Recording(2, say=heard.append))
    assert heard == ["session 2 is INVALID and is measured again: hot"]
    assert [plan.cold for plan in device.asked] == [PLAN.cold, False, False] and len(baseline.results) == 2
    assert all(m.status != INVALID for kept in baseline.results for m in kept.measurements)


def test_a_model_that_does_not_repeat_itself_is_no_baseline() -> None:
    class Fickle(Device):
        def __call__(self, plan: BenchOptions) -> Result:
            self.answers = {"tokens": [len(self.asked), *TOKENS], "nll": 2.5}
            return super().__call__(plan)

    with pytest.raises(RegressionError, match="does not answer the same twice"):
        record("tiny", Fickle(*FIVE), PLAN)


@pytest.mark.parametrize(
    ("plan", "runs", "says"),
    [
        (replace(PLAN, prompt=(8, 16)), 2, "one setting"),
        (replace(PLAN, text=(1, 2)), 2, "2 tokens says too little"),
        (replace(PLAN, repetitions=2), 2, "too few"),
        (replace(PLAN, repetitions=2), 3, "too few"),  # no later run of 2 would compare
        (replace(PLAN, repetitions=6), 0, "0 sessions record nothing"),
    ],
)
def test_a_plan_that_guards_nothing_is_refused(plan: BenchOptions, runs: int, says: str) -> None:
    with pytest.raises(RegressionError, match=says):
        record("tiny", Device(1.0, 1.0), plan, Recording(runs))


def test_another_device_is_named_with_what_differs(tmp_path: Path) -> None:
    device = Device(1.0)
    device.fingerprint = "b" * 16
    with pytest.raises(NoBaselineError, match="no baseline of tiny is of this device") as raised:
        guarded(tmp_path, device)
    assert raised.value.exit_code == 3 and "saap devices baseline" in str(raised.value)


def test_a_known_other_device_is_not_measured_first(tmp_path: Path) -> None:
    device = Device()
    with pytest.raises(NoBaselineError):
        retest(read_baselines(recorded(tmp_path), "tiny"), device, here="c" * 16)
    assert not device.asked


def test_each_device_has_its_own(tmp_path: Path) -> None:
    slow, again = Device(*[2.0] * 5), Device(2.0, 2.0)
    slow.fingerprint = again.fingerprint = "b" * 16
    assert retest(read_baselines(recorded(recorded(tmp_path), slow), "tiny"), again).exit_code == 0


def test_it_survives_the_disk(tmp_path: Path) -> None:
    baseline = record("a model/of mine", Named("a model/of mine", *FIVE), PLAN)
    path = write_baseline(tmp_path / "new", baseline)
    assert path.parent == tmp_path / "new" and read_baselines(tmp_path / "new", "a model/of mine") == [baseline]
    assert baseline.repetitions == 50
    plan = plan_of(baseline)
    assert (plan.prompt, plan.generate, plan.threads, plan.text, plan.greedy) == (8, 4, 1, TEXT, 16)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is damaged .Expecting value"),
        ("[1]", "is damaged .not an object"),
        ("{}", "is another kind of file .it has no 'baseline'."),
        ('{"baseline": 9}', "has device baseline 9, this saap reads 1"),
        ('{"baseline": 1, "name": "x"}', "is damaged .'results'"),
        ('{"baseline": 1, "name": "x", "results": []}', "is damaged .not one measurement a run"),
    ],
)
def test_a_damaged_baseline_is_named(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "tiny.abc.json").write_text(text)
    with pytest.raises(RegressionError, match=rf"tiny\.abc\.json {why}.*: record it again, or remove it"):
        read_baselines(tmp_path, "tiny")


def test_no_baseline_says_which_there_are(tmp_path: Path) -> None:
    recorded(tmp_path)
    (tmp_path / "cost.json").write_text("{}")  # not ours, and no reason to say something else
    with pytest.raises(RegressionError, match="holds no baseline of other; it has tiny: record one"):
        read_baselines(tmp_path, "other")


def test_junit_counts_what_went_wrong(tmp_path: Path) -> None:
    verdict = guarded(tmp_path, Device(1.10, 1.10, 1.10))
    suite = ElementTree.fromstring(device_junit(verdict).encode()).find("testsuite")
    assert suite is not None
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["8", "1", "0", "1"]
    (failed,) = [case for case in suite if case.find("failure") is not None]
    assert failed.get("name") == "decode"


def test_answers_are_those_of_a_decoder_that_is_asked_by_hand(tmp_path: Path) -> None:
    decoder = OnnxRuntimeEngine(tiny_bundle(tmp_path / "tiny"), EngineOptions(1, 40))
    told = continued(decoder, list(TEXT), 5)
    whole = BundleScorer(tmp_path / "tiny", 1)
    rows = whole.logits(np.array([TEXT]))[0].astype(np.float64)
    expected = np.mean([np.log(np.exp(row).sum()) - row[i] for row, i in zip(rows, TEXT[1:], strict=False)])
    assert told["nll"] == pytest.approx(float(expected), abs=1e-4)
    ids = list(TEXT)
    for token in told["tokens"]:
        assert token == int(np.argmax(whole.logits(np.array([ids]))[0, -1]))
        ids.append(token)


def test_a_likelihood_that_is_no_number_fits_into_json() -> None:
    class Broken(Engine):
        def rewind(self, length: int) -> int:
            return 0

        def prefill(self, ids: Any) -> Any:
            return np.full(8, np.nan, np.float32)

        step = prefill

    assert continued(Broken(), [1, 2, 3], 2)["nll"] is None


def test_a_run_asks_each_model(tmp_path: Path) -> None:
    specs = [str(tiny_bundle(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("c", 1))]
    plan = BenchOptions(prompt=4, generate=4, threads=1, repetitions=1, warmup=1, cold=False, text=TEXT, greedy=6)
    told = measure(specs, plan).settings["answers"]
    assert told["a"] != told["c"] and len(told["a"]["tokens"]) == 6


COMMAND = ["-p", "4", "-n", "4", "-t", "1", "-r", "3", "--sessions", "2", "--min-effect", "99"]


def baseline_of(bundle: Path, *options: object) -> str:
    """Recorded by the command, on a machine that nobody keeps quiet: an INVALID or blind one is made again."""
    for _ in range(5):
        done = here("devices", "baseline", bundle, *options, *COMMAND, code=None)
        if done.code != 3:
            break
    assert done.code == 0, done.stderr
    return done.stdout


def test_the_commands_catch_changed_weights(tmp_path: Path) -> None:
    """Real runs of real bundles. Their speeds are left out: nobody keeps this machine quiet."""
    bundle, folder, junit = tiny_bundle(tmp_path / "tiny"), tmp_path / "kept", tmp_path / "out" / "j.xml"
    told = baseline_of(bundle, "--baselines", folder)
    (kept,) = folder.glob("tiny.*.json")
    assert str(kept) in told
    tiny_bundle(bundle, seed=1)
    done = here(
        "devices", "test", bundle, "--baselines", folder, "--min-effect", "0.9", "--junit", junit, "--history",
        tmp_path / "history", code=1,
    )  # fmt: skip
    assert len(list((tmp_path / "history").glob("*.json"))) >= 2  # and the run that confirmed it
    assert "greedy tokens: worse, token 1 of 16" in done.stdout
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None and int(suite.get("failures", "0")) >= 1


def test_junit_is_there_before_a_terminal_that_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*told: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    found = guarded(tmp_path / "kept", Device(1.3, 1.3, 1.3))
    monkeypatch.setattr("bench.judge.regression.retest", lambda *a, **k: found)
    monkeypatch.setattr("saap.cli.devices.test.print_table", gone)
    bundle, junit = tiny_bundle(tmp_path / "tiny"), tmp_path / "j.xml"
    here("devices", "test", bundle, "--baselines", tmp_path / "kept", "--junit", junit, code=141)
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None and int(suite.get("failures", "0")) >= 1


def test_the_commands_say_what_is_missing(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    told = here("devices", "test", bundle, "--baselines", tmp_path / "none", "--junit", tmp_path / "j.xml", code=3)
    assert "holds no baseline of tiny" in told.stderr and 'errors="1"' in (tmp_path / "j.xml").read_text()
    inside = Path(sysconfig.get_path("purelib")) / "devices" / "baselines"
    told = refused("devices", "baseline", bundle, "--baselines", inside, *COMMAND)
    assert "inside the installed packages" in told and not inside.exists()
    (tmp_path / "file").touch()
    told = refused("devices", "baseline", bundle, "--baselines", tmp_path / "file/below", *COMMAND)
    assert "cannot be written (Not a directory): give another --baselines" in told  # before anything is measured
    assert "is for --on" in refused("devices", "test", bundle, "--board-packages")
    both = ["--on", "local://", "--board-packages", "--wheels", tmp_path]
    assert "give one of them" in refused("devices", "baseline", bundle, *both, *COMMAND)


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write_result(tmp_path / "a.json", result(measurement("a", [0.01] * 3)))
    told = refused("compare", tmp_path / "a.json", tmp_path / "a.json", "--junit", tmp_path / "file/j.xml")
    assert re.search(r"j\.xml cannot be written \((Not a directory|File exists)\): give another place", told)


def test_another_device_ends_with_3_and_junit_tells(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    recorded(tmp_path / "kept")
    junit = tmp_path / "j.xml"
    done = here("devices", "test", bundle, "--baselines", tmp_path / "kept", "--junit", junit, code=3)
    assert "no baseline of tiny is of this device" in done.stderr
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None and suite.get("errors") == "1"


def test_a_board_is_guarded_by_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This host by the protocol of a board, with the packages that its Python has."""
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "agent"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "kept"
    baseline_of(tiny_bundle(tmp_path / "tiny"), "--on", "local://", "--board-packages", "--baselines", folder)
    (kept,) = read_baselines(folder, "tiny")
    assert kept.on == "local://" and len(kept.results) == 2
