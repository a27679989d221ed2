from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx_ir")

from support.command_line import here, last_line
from support.remote_runs import remains, running
from support.sshd import Sshd

from bench.costs import measure as costs
from bench.measure.result import Bandwidth
from bench.remote import costs as remote_costs
from devices.common.files import with_checksum
from devices.transport import BoardError
from export.bundle.manifest import read_manifest
from export.graph.probe_model import read_probe_model
from export.graph.probe_stacks import write_probe_stacks
from saap.cli.console import Console
from saap.cli.costs import Place, probe_costs, probe_costs_step
from saap.models.shape import LayerSizes, ModelShape
from saap.prune.search.layer_costs import read_costs
from saap.system.errors import UserError

CONFIG = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPE = ModelShape(64, 32, 128, True, ())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (directory := tmp_path / "model").mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One round of few steps, and temporary files where the test can see them."""
    monkeypatch.setattr(costs, "measure_costs", partial(costs.measure_costs, rounds=1, seconds=0.0))
    monkeypatch.setattr(costs, "probe_bandwidth", lambda cpus, cache: Bandwidth(len(cpus), 1, [1e9]))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@pytest.mark.usefixtures("short")
def test_a_config_becomes_a_table_that_pruning_reads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Console() as console:
        probe_costs_step(
            str(model), tmp_path / "cost.json", threads=[1, 1], bits=8, block=None, depth=50, console=console
        )
    document: dict[str, Any] = json.loads((tmp_path / "cost.json").read_text())
    device = document["device"]
    table = read_costs(
        tmp_path / "cost.json", SHAPE, bits=8, group_size=32, threads=1, fingerprint=device["fingerprint"],
        onnxruntime=device["onnxruntime"],
    )  # fmt: skip
    assert (table.threads, table.depth) == (1, 50) and len(document["threads"]) == 1
    assert set(table.attention) == {(1, 1), (2, 1)} and set(table.ffn) == {32, 64}
    whole = [LayerSizes(2, 1, 64)] * 4
    assert table.total_ms(whole) == pytest.approx(document["threads"][0]["step_ms"])
    printed = capsys.readouterr().out
    assert "one layer with 1 thread at 50 tokens:" in printed and "2 query, 1 KV heads" in printed
    assert not list((tmp_path / "temporary").glob("saap-costs-*"))


@pytest.mark.usefixtures("short")
def test_a_failure_leaves_no_files(model: Path, tmp_path: Path) -> None:
    with pytest.raises(costs.CostsError, match="a depth of 9999 cannot be probed"):
        probe_costs(model, tmp_path / "cost.json", threads=[1], depth=9999)
    assert not (tmp_path / "cost.json").exists() and not list((tmp_path / "temporary").glob("saap-costs-*"))


def test_what_is_no_model_or_no_file_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model 'nothing'"):
        probe_costs("nothing", tmp_path / "cost.json")
    with pytest.raises(UserError, match="is a directory: give the JSON file to write"):
        probe_costs(model, tmp_path)
    with pytest.raises(UserError, match=r"cannot be written .*: give another place"):
        probe_costs(model, model / "config.json" / "cost.json")


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    yield from running(tmp_path, monkeypatch)


@pytest.mark.usefixtures("short")
def test_a_board_is_probed_from_here(model: Path, tmp_path: Path, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_costs, "costs_on", partial(remote_costs.costs_on, rounds=1, seconds=0.0))
    on, said = Place(sshd.url, own=False), list[str]()
    document = probe_costs(model, tmp_path / "pi.json", threads=[1], bits=8, depth=50, on=on, say=said.append)
    assert document["on"] == sshd.url and said == [] and not remains(sshd.cache)
    local = probe_costs(model, tmp_path / "here.json", threads=[1], bits=8, depth=50)
    assert document.keys() == {*local, "on"} and local["stacks"] == document["stacks"]
    assert [table.keys() for table in document["threads"]] == [table.keys() for table in local["threads"]]
    assert document["command"] == local["command"] and document["device"]["fingerprint"]
    table = read_costs(tmp_path / "pi.json", SHAPE, bits=8, group_size=32, threads=1)
    assert set(table.attention) == {(1, 1), (2, 1)} and set(table.ffn) == {32, 64}

    with pytest.raises(costs.CostsError, match="a depth of 99999 cannot be probed"):
        probe_costs(model, tmp_path / "other.json", threads=[1], depth=99999, on=on)
    with pytest.raises(BoardError, match=rf"{sshd.url}: 4096 threads"):
        probe_costs(model, tmp_path / "other.json", threads=[4096], depth=50, on=on)
    assert not (tmp_path / "other.json").exists() and not remains(sshd.cache)
    assert not list((tmp_path / "temporary").glob("saap-costs-*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "saap bench"}, "costs of another model"),
        ({"model": {"hidden": 1}}, "costs of another model"),
        ({"threads": []}, "other thread counts"),
        ({"checksum": "sha256:0"}, "changed after it was written"),
    ],
)
def test_a_board_that_answers_something_else(model: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    (stack, *_) = write_probe_stacks(read_probe_model(model, 8, None), tmp_path)
    base = read_manifest(stack)
    cost = {"query_heads": 2, "kv_heads": 1, "ms": 1.0}
    table = {"n_threads": 1, "step_ms": 1.0, "constant_ms": 0.5, "node_ms": None, "attention": [cost], "ffn": []}
    whole = {"kind": costs.KIND, "model": costs.described(base), "threads": [table], "versions": {}}
    assert remote_costs._checked("pi", with_checksum(whole), base, [1])["on"] == "pi"
    with pytest.raises(ValueError, match=told):
        remote_costs._checked("pi", {**with_checksum(whole | change), **change}, base, [1])
    for wrong in ({"attention": [cost | {"ms": "1"}]}, {"step_ms": None}, {"node_ms": "0"}):
        with pytest.raises(TypeError):
            remote_costs._checked("pi", whole | {"threads": [table | wrong]}, base, [1])


def test_a_board_is_for_costs_only() -> None:
    assert "--on is of --costs" in last_line(here("devices", "probe", "--on", "local://", code=2))
    done = here("devices", "probe", "--costs", "x", "--on", "local://", "--wheels", "w", "--board-packages", code=2)
    assert "--wheels fills a venv there" in last_line(done)
