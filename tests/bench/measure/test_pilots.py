"""A peer is measured with the settings that are fastest here: which they are, by turns, and what is said of it."""

from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import pytest
from support.report_page import measurement, result

from bench.measure import bursts
from bench.measure.options import BenchOptions
from bench.measure.pilots import LEAST_GAIN, Pilot, at_their_best, fastest, sentence
from bench.measure.result import Bursts, Load, ModelFacts, read_result, write_result
from bench.report.tables import peer_notes
from bench.runtimes.peers import Peer
from export.engine.table import FLASH_ATTENTION, row_of
from saap.base.errors import UserError

ON, OFF = FLASH_ATTENTION


@pytest.fixture
def peers():
    spec = "llama.cpp:tiny.gguf"
    return [
        Peer("tiny (llama.cpp)", spec, "llama.cpp", Path("tiny.gguf"), row_of("llama.cpp"), 320, None, ModelFacts(), {})
    ]


@pytest.fixture
def turns(monkeypatch):
    """Seconds of a token and of the prompt by number of threads, for each setting: what the turns then tell."""
    known, asked = {}, []

    def take(players, setting, plan, progress=None, *, load_s):
        asked.append((setting.threads, setting.positions, plan.ratio_time_s, load_s))
        names = [player.name for player in players]
        assert [player.choice for player in players] == names
        if known.get(setting.threads) is None:
            return Bursts(names, 1, 1, 0, setting.threads, [], failure="too large")
        tokens, prompts = ([[seconds[name]] * 3 for name in names] for seconds in known[setting.threads])
        return Bursts(names, 1, 1, 0, setting.threads, [Load([0, 1], prompts, tokens)] * 4)

    monkeypatch.setattr(bursts, "take_bursts", take)
    return known, asked


def test_the_faster_in_decode_is_measured_and_the_faster_in_prefill_beside_it(peers, turns):
    known, asked = turns
    known[1] = {ON: 0.020, OFF: 0.014}, {ON: 0.25, OFF: 0.36}
    found, (pilot,) = at_their_best(peers, BenchOptions(threads=1, prompt=(32, 128)))
    assert [(peer.name, peer.choice) for peer in found] == [
        ("tiny (llama.cpp)", OFF), ("tiny (llama.cpp), flash attention on", ON),
    ]  # fmt: skip
    assert asked == [(1, 256, 8.0, 1.0)]
    assert sentence(pilot) == (
        "tiny (llama.cpp), 1 thread, fastest: decode flash attention off (1.43x the time flash attention on); "
        "prefill flash attention on (1.44x the time flash attention off)"
    )


def test_what_is_within_noise_stays_as_the_runtime_has_it(peers, turns):
    known, _ = turns
    known[1] = {ON: 0.0200, OFF: 0.0198}, {ON: 0.25, OFF: 0.36}
    found, _ = at_their_best(peers, BenchOptions(threads=1))
    assert [peer.choice for peer in found] == [ON]
    assert fastest({"a": 1.0, "b": 1 - LEAST_GAIN}) == "a" and fastest({"a": 1.0, "b": 0.97}) == "b"


def test_thread_counts_may_differ_in_what_is_best(peers, turns):
    known, _ = turns
    known[1] = {ON: 0.02, OFF: 0.01}, {ON: 0.2, OFF: 0.1}
    known[2] = {ON: 0.01, OFF: 0.02}, {ON: 0.1, OFF: 0.2}
    found, pilots = at_their_best(peers, BenchOptions(threads=(1, 2)))
    assert [peer.choice for peer in found] == [OFF, ON] and [pilot.best for pilot in pilots] == [[OFF], [ON]]


def test_a_pilot_that_fails_leaves_the_default(peers, turns):
    found, (pilot,) = at_their_best(peers, BenchOptions(threads=1))
    assert [peer.choice for peer in found] == [ON]
    assert sentence(pilot) == "tiny (llama.cpp): its settings were not tried: too large"


def test_a_choice_that_is_made_is_not_tried(peers, turns):
    _, asked = turns
    found, pilots = at_their_best(peers, BenchOptions(threads=1, choice=OFF))
    assert [peer.choice for peer in found] == [OFF] and pilots == asked == []
    with pytest.raises(UserError, match=r"^choice 'faster' is no setting of what is measured: flash attention on, "):
        at_their_best(peers, BenchOptions(threads=1, choice="faster"))


def test_only_runtimes_with_a_choice_are_piloted(peers, turns):
    plain = [replace(peers[0], row=row_of("openvino"))]
    assert at_their_best(plain, BenchOptions(threads=1)) == (plain, [])


def test_a_result_keeps_its_pilots_and_says_them(tmp_path):
    pilot = Pilot("peer", 2, {ON: 0.02, OFF: 0.01}, {})
    document = result(measurement("peer", 10.0, choice=OFF), settings={"pilots": [asdict(pilot)]})
    write_result(tmp_path / "result.json", document)
    kept = read_result(tmp_path / "result.json")
    assert kept.measurements[0].choice == OFF
    assert peer_notes(kept) == [
        "peer, 2 threads, fastest: decode flash attention off (2.00x the time flash attention on)"
    ]
    assert msgspec.convert(kept.settings["pilots"][0], Pilot) == pilot


def test_a_llama_cpp_that_was_built_for_another_cpu_is_said(tmp_path):
    def notes(line, isa):
        document = result(measurement("peer", 10.0), versions={"llama.cpp system": line}, device={"isa": isa})
        return peer_notes(document)

    assert notes("CPU : AVX2 = 1 | FMA = 1 |", ["avx2", "fma"]) == []
    (note,) = notes("CPU : AVX2 = 1 | FMA = 1 |", ["avx2", "fma", "avx512_vnni"])
    assert note.startswith(
        "llama.cpp was built without AVX512_VNNI, which this CPU has, and is slower for it: build it"
    )
    assert peer_notes(result(measurement("ours", 10.0))) == []
