"""Two real processes that meet over gloo, started by ``accelerate launch``, against one with the same global batch."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from support import train_in_processes
from support.command_line import here
from support.launching import DATA_PARALLEL, SHARDED, launch
from torch.torch_version import TorchVersion

from saap.base.errors import UserError
from saap.models.record import read_record
from saap.tune.loop import processes
from saap.tune.loop.processes import FSDP_TORCH, join_processes
from saap.tune.loop.steps import steps_of
from saap.tune.options import TrainOptions

TOO_OLD = pytest.mark.skipif(TorchVersion(torch.__version__) < FSDP_TORCH, reason="FSDP needs a newer torch")

WEIGHTS = ("--train", "weights", "--learning-rate", "0.001")


def found(out, run, rank=0):
    """What a process reported about a run, and its trained parameters."""
    report = json.loads((out / f"{run}-{rank}.json").read_text(encoding="utf-8"))
    return SimpleNamespace(report=report, tensors=load_file(out / f"{run}-{rank}.safetensors"))


def agree(one, other):
    assert one.report["losses"] == pytest.approx(other.report["losses"], abs=1e-6)
    for (step, loss), (other_step, other_loss) in zip(one.report["held_out"], other.report["held_out"], strict=True):
        assert step == other_step and loss == pytest.approx(other_loss, abs=1e-6)
    assert one.tensors.keys() == other.tensors.keys()
    for name, value in one.tensors.items():
        assert torch.allclose(value, other.tensors[name], atol=2e-6), name


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory):
    """What one process does, and the words of its command; two of them begin where it was killed."""
    home = tmp_path_factory.mktemp("alone")
    path, teacher, text = llama(home / "tiny"), llama(home / "teacher", seed=1), home / "text.txt"
    text.write_text("\n".join(f"Line {n} of a text that is long enough to be learnt from, again." for n in range(400)))
    command = ["tune", path, "--data", text, "--tokens", "1600", "--length", "64", "--batch", "4",
               "--teacher", teacher, "--precision", "fp32", "--micro-batch", "1", "--set", "held_out=0.4"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAAP_CACHE", str(home / "cache"))
        here(*command, "-o", home / "out/by-one")
        here(*command, *WEIGHTS, "-o", home / "out/weights-by-one")
    train_in_processes.main(str(path), home / "out", "alone")
    train_in_processes.main(str(path), home / "out", "begun-by-one", kill=3)
    return SimpleNamespace(model=str(path), command=[str(word) for word in command], out=home / "out")


@pytest.mark.parametrize("how", [pytest.param(SHARDED, marks=TOO_OLD), DATA_PARALLEL], ids=["sharded", "data parallel"])
def test_two_processes_do_what_one_does(alone, tmp_path, monkeypatch, how):
    """They start once for all: runs of the loop, and then the command."""
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))  # without the teacher's answers
    shutil.copytree(alone.out, tmp_path, dirs_exist_ok=True)
    runs = [{"state": "two"}, {"state": "begun-by-two", "kill": 3}, {"state": "begun-by-one"}]
    runs.append({"state": "poisoned", "poison": 2})
    both = (("by-two", ()), ("weights-by-two", WEIGHTS))
    words = json.dumps([[*alone.command, *more, "-o", str(tmp_path / name)] for name, more in both])
    launch(how, train_in_processes.__file__, alone.model, tmp_path, json.dumps(runs), words)
    train_in_processes.main(alone.model, tmp_path, "begun-by-two")
    loops_agree(tmp_path, how)
    commands_agree(tmp_path)


def loops_agree(tmp_path, how):
    alone, first, second = found(tmp_path, "alone"), found(tmp_path, "two"), found(tmp_path, "two", 1)
    for process in (first, second):
        assert process.report["kind"] == ("FSDP" if how == SHARDED else "MULTI_CPU")
        assert process.report["sharded"] == (how == SHARDED)
    assert len(alone.report["losses"]) == 3 and len(alone.report["held_out"]) == 4
    agree(first, alone)
    # both have the same bits, so that they decide the same
    for key in ("losses", "held_out", "best_step", "stopped"):
        assert first.report[key] == second.report[key], key
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    # one talks, and one state is on disk
    assert len(first.report["said"]) == 4 and second.report["said"] == []
    assert len(list((tmp_path / "two").iterdir())) == 1

    # one process continues what two began, and the reverse
    for run, ranks in (("begun-by-two", (0,)), ("begun-by-one", (0, 1))):
        for rank in ranks:
            continued = found(tmp_path, run, rank)
            assert continued.report["resumed_at"] == 2
            agree(continued, alone)

    # a loss that is not finite in one of them ends both, with the same state
    poisoned = [found(tmp_path, "poisoned", rank) for rank in (0, 1)]
    assert poisoned[0].report["error"] == poisoned[1].report["error"]
    best = poisoned[0].report["best_step"]
    said = f"the loss became nan at step 2 of 3; the state of step {best} (held-out loss "
    assert poisoned[0].report["error"].startswith(said)
    assert all(torch.equal(poisoned[0].tensors[name], value) for name, value in poisoned[1].tensors.items())


def commands_agree(tmp_path):
    told = [json.loads((tmp_path / f"command-{rank}.json").read_text()) for rank in (0, 1)]
    for first, second in zip(*told, strict=True):
        assert first["stdout"].count("held-out KL") == 1 and second["stdout"] == ""
    for key, name in (("tuning", "by"), ("weights", "weights-by")):
        histories = [read_record(tmp_path / f"{name}-{number}")[key]["history"] for number in ("one", "two")]
        assert histories[0]["losses"] == pytest.approx(histories[1]["losses"], abs=2e-5)
        one, two = (load_file(tmp_path / f"{name}-{number}" / "model.safetensors") for number in ("one", "two"))
        assert one.keys() == two.keys()
        for tensor, values in one.items():
            if values.dtype == torch.uint8:  # a code may fall on the other side of the middle
                assert (values != two[tensor]).float().mean() < 0.001, tensor
            else:  # Adam makes whole steps of gradients that are nearly 0
                near = torch.isclose(values, two[tensor], rtol=2e-3, atol=1e-6)
                assert near.all() or (key == "weights" and near.float().mean() > 0.99), tensor
    assert not list(tmp_path.glob(".*by-two*"))


def test_fsdp_of_a_torch_that_errs_with_it_is_refused(monkeypatch):
    state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(
        processes, "Accelerator", lambda **_: SimpleNamespace(state=state, num_processes=1, is_fsdp2=True)
    )
    monkeypatch.setattr(torch, "__version__", "2.8.0+cpu")
    with pytest.raises(UserError, match=r"FSDP needs torch 2.9 and this is 2.8.0\+cpu: install it, or"):
        join_processes()


def test_rows_that_cannot_be_split_are_refused():
    ids = torch.zeros(8, 4, dtype=torch.int64)
    assert steps_of({"ids": ids}, TrainOptions(rows_per_step=4, passes=3), 2) == 6
    with pytest.raises(UserError, match="4 rows per step cannot be split over 3 processes"):
        steps_of({"ids": ids}, TrainOptions(rows_per_step=4), 3)


def test_processes_that_did_not_meet_are_refused(monkeypatch):
    """Each would take itself for the main one and write over the other's files."""
    join_processes()  # alone, which accelerate remembers
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started and 1 joined"):
        join_processes()
