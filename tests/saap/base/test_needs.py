"""Memory and disk are known before anything is read; a model that does not fit is read layer by layer."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.command_line import here, refused

from export.needs import export_needs
from saap.base import needs as module
from saap.base.errors import UserError
from saap.base.needs import Needs, available_memory, check_disk, check_memory, fits
from saap.models.architectures import shape_of
from saap.models.checkpoint import read_config
from saap.models.needs import eval_needs
from saap.models.record import read_record
from saap.models.streaming import is_streamed
from saap.prune import pruning
from saap.prune.needs import prune_disk, prune_needs
from saap.prune.options import PruneOptions
from saap.prune.pruning import budget_of, prune, streamed

IDS = torch.randint(0, 300, (8, 24), generator=torch.Generator().manual_seed(1))
OPTIONS = PruneOptions(ratio=0.4, keep=frozenset({"blocks"}))  # longer runs of layers are tried where all are in memory


def files_of(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "saap.json"}


@pytest.mark.parametrize("method", ["saap", "flap", "wanda_sp", "shortgpt"])
def test_read_layer_by_layer_the_same_bytes_come_out(method, tiny_model, tmp_path, monkeypatch):
    path = tiny_model()
    options = OPTIONS if method == "saap" else PruneOptions(ratio=0.4, method=method)
    prune(path, replace(options, stream=False), output=tmp_path / "whole", calibration=IDS)
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))  # no score is taken over
    seen = []
    load = pruning.load_streamed
    monkeypatch.setattr(
        pruning, "load_streamed", lambda source, **where: seen.append(load(source, **where)) or seen[-1]
    )
    prune(path, replace(options, stream=True), output=tmp_path / "streamed", calibration=IDS)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "streamed")
    assert len(seen) == 1 and all(map(is_streamed, seen))
    records = [read_record(tmp_path / name) for name in ("whole", "streamed")]
    assert records[0]["plan"]["layers"] == records[1]["plan"]["layers"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_what_does_not_fit_is_read_layer_by_layer(tiny_model, monkeypatch):
    path = tiny_model(num_hidden_layers=6)  # of three layers one with its file is no less than all
    budget = budget_of(path, OPTIONS)
    whole, single = (prune_needs(budget.dense, 8, 24, 600_000, streamed=s).memory_bytes for s in (False, True))
    assert single < whole
    for free, expected in ((2 * whole, False), ((whole + single) / 2, True)):
        monkeypatch.setattr(module, "available_memory", lambda free=free: free / module.FREE_SHARE)
        assert streamed(path, budget, OPTIONS, 8, 24) is expected
        assert streamed(path, budget, replace(OPTIONS, stream=True), 8, 24) is True
    with pytest.raises(UserError, match=r"pruning needs .* \(the process 560 MB, .*\), and .* are free: leave"):
        streamed(path, budget, replace(OPTIONS, stream=False), 8, 24)
    with pytest.raises(UserError, match="param_mix needs the whole model"):
        streamed(path, budget, replace(OPTIONS, keep=frozenset(), method="param_mix"), 8, 24)
    monkeypatch.setattr(module, "available_memory", lambda: single / 2)
    with pytest.raises(UserError, match="fewer --sequences or a smaller --length"):
        streamed(path, budget, OPTIONS, 8, 24)


def test_sums_grow_with_what_they_are_made_of(tiny_model):
    shape = shape_of(read_config(tiny_model()))
    for streaming in (False, True):
        base = prune_needs(shape, 64, 256, 600_000, streamed=streaming).memory_bytes
        assert prune_needs(shape, 64, 512, 600_000, streamed=streaming).memory_bytes > base
        assert prune_needs(shape, 256, 256, 600_000, streamed=streaming).memory_bytes > base
    wide = prune_needs(shape, 1, 256, 600_000, streamed=False, element="exact").memory["activations"]
    narrow = prune_needs(shape, 1, 256, 600_000, streamed=False).memory["activations"]
    pair = prune_needs(shape, 2, 256, 600_000, streamed=False).memory["activations"]
    assert wide > narrow and 1.9 * narrow < pair < 2.1 * narrow  # two sequences are scored at once
    size, layers = 4 * shape.parameters, 4 * shape.layer_weights  # of disk: what lies there at the same time
    disk = prune_disk(shape, size, 0.5)
    assert disk["the slim model"] == pytest.approx(size - layers / 2, abs=1)
    assert disk["refitted matrices"] == 4 * 3 * 96 * (128 + 96)


def test_exports_and_evaluations_are_refused_before_a_weight_is_read(tiny_model, tmp_path, monkeypatch):
    path, text = tiny_model(), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    shape = shape_of(read_config(path))
    with_parity, without = (export_needs(shape, 1_000_000, tokens) for tokens in (1024, 0))
    assert with_parity.memory_bytes > without.memory_bytes and without.disk == {"the bundle": 1_000_000}
    large = export_needs(shape, 4 << 30, 1024).memory
    assert large["a piece of the bundle as ONNX Runtime packs it"] < 2.75 * (4 << 30) / 2
    whole, single = (eval_needs(shape, 256, streamed=streamed) for streamed in (False, True))
    assert whole.memory["weights"] == 4 * shape.parameters
    assert single.memory["embedding and head"] + 3 * single.memory["a layer"] == whole.memory["weights"]
    monkeypatch.setattr(module, "available_memory", lambda: 10_000_000)
    told = refused("export", path, "-o", tmp_path / "bundle")
    assert "exporting needs" in told and "give --parity none" in told
    assert not list(tmp_path.glob("*bundle*"))
    told = refused("eval", path, "--text", text, "--chunk", 32)
    assert "evaluating needs" in told and "give a smaller --chunk" in told


def test_a_run_is_refused_before_its_first_step(tiny_model, tmp_path, monkeypatch):
    path, free = tiny_model(), 500_000_000
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    monkeypatch.setattr(module, "available_memory", lambda: free)
    told = refused("run", path, "--ratio", 0.3, "--text", text, "-o", tmp_path / "out")
    assert re.search(r"a run, in its step \w+, needs \d+ MB of memory \(.*\), and 500 MB are free: the other", told)
    monkeypatch.setattr(module, "available_memory", lambda: 10 * free)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: SimpleNamespace(free=100_000))
    told = refused("run", path, "--ratio", 0.3, "--text", text, "-o", tmp_path / "out")
    assert "a run needs" in told and "two bundles" in told and not (tmp_path / "out").exists()


def test_a_refusal_says_the_sum_what_is_free_and_what_to_do(tmp_path, monkeypatch):
    needs = Needs({"weights": 3_000_000_000, "activations": 20_000_000}, {"the slim model": 5_000_000_000_000_000})
    monkeypatch.setattr(module, "available_memory", lambda: 2_000_000_000)
    assert not fits(needs) and fits(Needs({"weights": 1_000_000}))
    with pytest.raises(UserError) as caught:
        check_memory(needs, "tuning", "give --batch 1")
    assert str(caught.value) == (
        "tuning needs 3.0 GB of memory (weights 3.0 GB, activations 20 MB), and 2.0 GB are free: give --batch 1"
    )
    with pytest.raises(UserError, match=r"tuning needs 5000000.0 GB of disk .* are free at .*: make room"):
        check_disk(needs, tmp_path / "new/deep", "tuning")
    check_disk(Needs({}, {"the slim model": 1}), tmp_path / "new/deep", "tuning")


def test_free_memory_is_the_groups_where_it_is_less(tmp_path):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    assert available_memory(tmp_path) > 10_000_000
    (group / "memory.max").write_text("9000000\n")
    (group / "memory.current").write_text("2000000\n")
    assert available_memory(tmp_path) == 7_000_000


def test_the_command_says_how_it_reads_the_model(tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 400)
    common = ("prune", tiny_model(), "-o", tmp_path / "slim", "--ratio", 0.2, "--calibration", text, "--stream")
    assert "needs the gradients of all weights at once" in refused(*common, "--method", "param_mix")
    assert "the model is read layer by layer" in here(*common, "--sequences", 8, "--length", 24).stderr


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    whole = available_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory() == pytest.approx(whole / 4, rel=0.2)
