"""Bundles that are planned, held against a device before a run begins."""

import math
import re
from dataclasses import replace

import pytest
from support.cost_files import cost_file
from support.exported import export_bundle

from devices.fit.memory import memory_of, packed_share
from export.options import ExportOptions
from saap import WHEEL
from saap.base.errors import UserError
from saap.base.options import build
from saap.base.values import parse_bytes
from saap.cli.console import Console
from saap.cli.devices.fit import Planned, board_commands, check_costs, check_pruned, read_model
from saap.cli.report import DeviceFit
from saap.cli.run import RunOptions
from saap.cli.run import fitted as fitted_options

ARRAYS = 40  # in the file of a model of three layers, each of which is followed by less than a page


def asked(**given):
    return build(RunOptions, {"profile": "raspberry-pi-4", **given})


def fitted(model, options):
    return fitted_options(model, options, Console())


def room_for(dense, size, context=256):
    """RAM of a Raspberry Pi 4 that has room for a weights file of this size."""
    model, device = dense.model, asked().demands.device
    total = memory_of(model, device, context).total - (model.file_bytes - size) * packed_share(model, device)
    return math.ceil(total / (0.93 * 0.75)) + 1000


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, ExportOptions()),
        ({"tie_word_embeddings": False}, ExportOptions(bits=4, head_bits=8)),
        ({"num_attention_heads": 3, "head_dim": 32, "num_key_value_heads": 1}, ExportOptions(dotprod=False)),
    ],
)
def test_a_planned_bundle_is_the_one_that_is_exported(tiny_model, tmp_path, config, options):
    model = tiny_model(vocab_size=4096, **config)
    planned = Planned.of(model, options).model
    export_bundle(model, tmp_path / "b", bits=4, head_bits=options.head_bits, dotprod=options.dotprod)
    real = read_model(tmp_path / "b")
    read = real.weight_bytes_per_token
    assert replace(planned, weight_bytes_per_token=read) == real
    assert read <= planned.weight_bytes_per_token < read + 4096 * ARRAYS


def test_a_model_is_pruned_as_far_as_the_device_demands(tiny_model, capsys):
    """Where nothing is asked for; what is asked for and does not fit is refused, and the advice fits."""
    model = tiny_model()
    dense = Planned.of(model, asked().export(tuned=False))
    fifth = dense.bytes_at("ratio", 0.2)
    ample, enough, tight = (room_for(dense, size) for size in (dense.model.file_bytes, fifth, fifth - 15_000))

    capsys.readouterr()  # the model's writing says how far it is
    for memory in (ample, enough):
        assert fitted(model, asked(memory=memory)).prune.options.asked == {"ratio": 0.2}
        assert fitted(model, asked(memory=memory, ratio=0.3)).prune.options.asked == {"ratio": 0.3}
    ratio = "Raspberry Pi 4 has no table of costs: the model is pruned by a ratio, 0.2\n"
    assert capsys.readouterr().err == 2 * ratio
    chosen = fitted(model, asked(memory=tight)).prune.options.asked["max_bytes"]
    told = f"Raspberry Pi 4 has room for a weights file of {chosen // 1000} kB: the model is pruned to that\n"
    assert capsys.readouterr().err == told
    assert fifth - 17_000 < chosen <= fifth - 15_000 + 1000

    for given in ({"ratio": 0.2}, {"max_bytes": fifth}, {"max_params": dense.parameters - dense.layer_weights // 5}):
        with pytest.raises(UserError) as caught:
            fitted(model, asked(memory=tight, **given))
        flag = "--" + next(iter(given)).replace("_", "-")
        told = re.fullmatch(
            rf"{flag} leaves a weights file of (\d+) kB, and Raspberry Pi 4 has room for one of (\d+) kB beside a "
            r"context of 256 tokens: give --max-bytes (\w+) or --ratio (0\.\d+)( or --set context=(\d+))?",
            str(caught.value),
        )
        assert told and int(told[1]) == pytest.approx(fifth / 1000, abs=1)
        assert parse_bytes(told[3]) == chosen and int(told[2]) == pytest.approx(chosen / 1000, abs=1)
        fitted(model, asked(memory=tight, max_bytes=parse_bytes(told[3])))
        fitted(model, asked(memory=tight, ratio=float(told[4])))
        if told[6]:
            fitted(model, asked(memory=tight, context=int(told[6]), **given))


def test_what_cannot_be_pruned_that_far_is_told_what_else_would_fit(tiny_model):
    model = tiny_model()
    dense = Planned.of(model, asked().export(tuned=False))
    memory = room_for(dense, dense.model.file_bytes - dense.layer_bytes, context=100)
    for given in ({}, {"ratio": 0.2}):
        with pytest.raises(UserError) as caught:
            fitted(model, asked(memory=memory, context=100, **given))
        assert "--max-bytes" not in str(caught.value) and "--ratio or" not in str(caught.value)
        assert re.search(r"has room for one of \d+ kB beside a context of 100 tokens: give ", str(caught.value))
    with pytest.raises(UserError, match=r"Raspberry Pi 4 has room for none beside a context of 256 tokens: give a sm"):
        fitted(model, asked(memory=64 << 20))


def test_a_speed_is_held_against_the_device_when_its_model_is_planned(tiny_model, tmp_path):
    model, costs = tiny_model(), cost_file(tmp_path / "cost.json")
    timed = {"speedup": 1.2, "costs": costs, "threads": 1}
    dense = Planned.of(model, asked().export(tuned=False))
    tight = asked(memory=room_for(dense, dense.model.file_bytes - 20_000), **timed)
    assert fitted(model, tight) == tight
    with pytest.raises(UserError, match=r"^the pruned model has a weights file of .*: give --max-bytes \d+kB"):
        check_pruned(tight.demands, dense)
    check_pruned(asked(memory=1 << 30).demands, dense)


def test_costs_of_another_board_are_refused(tmp_path):
    device = {"board": "Raspberry Pi 5", "compatible": ["raspberrypi,5-model-b", "brcm,bcm2712"]}
    costs = cost_file(tmp_path / "cost.json", device=device)
    check_costs("raspberry-pi-5", costs)
    with pytest.raises(UserError, match=r"was measured on raspberry-pi-5, and the bundle is for raspberry-pi-4: mea"):
        asked(speedup=1.5, costs=costs).check_device()
    check_costs("raspberry-pi-5", cost_file(tmp_path / "unknown.json"))  # of a host without a device tree


def test_commands_for_a_board(tmp_path):
    found = DeviceFit(name="X", fits=True, context=4096, takes=1, has=2, memory="", threads=None)
    assert [command for _, command in board_commands(found, tmp_path / "my slim")] == [
        f"scp -r '{tmp_path}/my slim' USER@BOARD:",
        f"make wheel && scp dist/{WHEEL} USER@BOARD:",
        f"pip install './{WHEEL}[bench]'",
        "saap generate 'my slim'",
        f"saap bench '{tmp_path}/my slim' --on ssh://USER@BOARD",
    ]
    smaller = DeviceFit(name="X", fits=True, context=512, takes=1, has=2, memory="", threads=4)
    assert "saap generate slim --context 512 --threads 4" in dict(board_commands(smaller, tmp_path / "slim")).values()
