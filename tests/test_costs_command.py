from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx_ir")

from bench import costs
from bench.result import Bandwidth
from saap.console import Console
from saap.cost import read_costs
from saap.costs_command import probe_costs, probe_costs_step
from saap.errors import SaapError
from saap.structures import LayerSizes, ModelShape

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
        tmp_path / "cost.json", SHAPE, bits=8, block=32, threads=1, fingerprint=device["fingerprint"],
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
    with pytest.raises(SaapError, match="no model 'nothing'"):
        probe_costs("nothing", tmp_path / "cost.json")
    with pytest.raises(SaapError, match="is a directory: give the JSON file to write"):
        probe_costs(model, tmp_path)
    with pytest.raises(SaapError, match=r"cannot be written .*: give another place"):
        probe_costs(model, model / "config.json" / "cost.json")
