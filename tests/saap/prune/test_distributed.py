"""Pruning by two real processes under ``accelerate launch``, against one."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import commands_in_processes
from support.command_line import here
from support.launching import DATA_PARALLEL, launch

from saap.base.errors import UserError
from saap.base.needs import available_memory
from saap.models.record import read_record
from saap.prune.cut.ridge import Products, Rows, regression
from saap.prune.shares import Shares, joined
from saap.system.gpu import out_of_memory

LINES = [f"Line {n} of a text that is long enough to be scored on, {n * n} and more." for n in range(400)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    return path


CASES = {
    "in steps": (["--stages", "2"], ("17", "32")),
    "streamed": (["--stream"], ("12", "16")),  # fewer tokens than inputs
    "bias": (["--method", "flap"], ("9", "32")),
    "exact": (["--set", "score=element", "--set", "exact=true"], ("10", "32")),
}


def test_two_processes_prune_as_one_does(tiny_model, text, tmp_path):
    """Both start once for all cases, which spares the imports; what one of them meets ends both in one line."""
    assert regression(12 * 16, 320, 96).__class__ is Rows
    model, wide = str(tiny_model()), str(tiny_model("wide", intermediate_size=512))
    commands = {
        name: ["prune", wide if name == "streamed" else model, "--ratio", "0.3", "--calibration", str(text),
               "--sequences", sequences, "--length", length, *how]
        for name, (how, (sequences, length)) in CASES.items()
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    for name, words in commands.items():
        here(*words, "-o", one / name)
    shutil.rmtree(os.environ["SAAP_CACHE"])
    two.mkdir()
    broken = tiny_model("broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e38  # finite, but what it computes is not
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    together = [[*words, "-o", str(two / name)] for name, words in commands.items()]
    scored = [word for word in commands["bias"][2:] if word not in CASES["bias"][0]]
    together.append(["prune", str(broken), *scored, "-o", str(two / "broken")])
    launch(DATA_PARALLEL, commands_in_processes.__file__, two, json.dumps(together))

    talks, is_silent = (json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1))
    *pruned, failed = zip(talks, is_silent, strict=True)
    assert [said["stdout"].count("layers' weights removed") for said, _ in pruned] == [1] * len(CASES)
    assert {(said["code"], other["code"], other["stdout"]) for said, other in pruned} == {(0, 0, "")}
    assert failed[0]["code"] and failed[1]["code"] and not (two / "broken").exists()
    assert "a price is not finite on the calibration text: check the model and the text" in failed[0]["stderr"]
    assert not list(two.glob(".*"))
    for name in CASES:
        agree(one / name, two / name)


def agree(one, two):
    """Of two slim directories the plans are the same, and the weights and prices but for rounding."""
    first, second = read_record(one), read_record(two)
    assert first["plan"]["layers"] == second["plan"]["layers"], one.name
    assert first["plan"]["price_nats"] == pytest.approx(second["plan"]["price_nats"], rel=2e-3)
    assert first["lineage"]["calibration"] == second["lineage"]["calibration"]
    weights, others = (load_file(path / "model.safetensors") for path in (one, two))
    assert weights.keys() == others.keys()
    for name, values in weights.items():
        assert torch.allclose(values, others[name], rtol=1e-3, atol=1e-5), (one.name, name)


def test_one_process_is_alone_and_keeps_what_it_has():
    with joined() as together:
        assert together == Shares() and together.main
        assert together.each([1, 2, 3], lambda x: x / 2) == [0.5, 1.0, 1.5]
        assert together.agreed({"a": [1]}) == {"a": [1]} and together.total(2.5) == 2.5
        for form in (Rows(4, 2), Products(4, 2)):
            form.add(torch.ones(3, 4), torch.ones(3, 2))
            before = form.error(torch.zeros(2, 4))
            form.gather([3], 0)
            assert form.error(torch.zeros(2, 4)) == before == 6


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    whole = available_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory() == pytest.approx(whole / 4, rel=0.2)


@pytest.mark.parametrize(
    ("name", "said"),
    [("tpu9", "device 'tpu9' is not known"), ("meta", "is not known: give auto, cpu, cuda"), ("cuda:77", "sees")],
)
def test_a_device_that_is_not_there_is_refused(tiny_model, text, tmp_path, name, said):
    command = ["prune", tiny_model(), "--ratio", "0.3", "--calibration", text, "--device", name]
    assert said in here(*command, "-o", tmp_path / "out", code=2).stderr


def test_a_gpu_that_is_full_is_told_in_one_line():
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
    with pytest.raises(UserError, match=r"^CUDA out of memory: give less$"), out_of_memory("give less"):
        raise torch.OutOfMemoryError(said)
