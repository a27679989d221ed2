import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx_ir")

from support.command_line import here, last_line
from support.remote_runs import remains, running
from support.sshd import Sshd

from bench.costs import measure as costs
from bench.costs.fit import MeasuredCosts
from bench.costs.options import CostsOptions
from bench.measure.result import Bandwidth
from bench.remote.options import BoardOptions
from bench.remote.target import Target, _costs
from devices.transport import BoardError
from export.bundle.manifest import read_manifest
from export.gguf.probe import write_probe_gguf
from export.graph.probe_model import read_probe_model
from export.graph.probe_stacks import ProbeStack, write_probe_stacks
from saap.base.costs import AttentionCost, FfnCost
from saap.base.errors import UserError
from saap.base.files import with_checksum
from saap.base.gguf_header import read_header
from saap.base.interpreters import python_with
from saap.cli.devices.costs import CostsCommand, keep_costs, probe_costs
from saap.models.shape import LayerSizes, ModelShape
from saap.prune.search.layer_costs import read_costs

CONFIG = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPE = ModelShape(64, 32, 128, True, ())
QUICK = CostsOptions(threads=(1,), depth=50, rounds=1, seconds=0.0)  # one round of few steps
ASKED = CostsCommand(QUICK, bits=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (directory := tmp_path / "model").mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No probe of the memory, and temporary files where the test can see them."""
    monkeypatch.setattr(costs, "probe_bandwidth", lambda cpus, cache: Bandwidth(len(cpus), 1, [1e9]))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@pytest.mark.usefixtures("quick_probe")
def test_a_config_becomes_a_table_that_pruning_reads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = CostsCommand(replace(QUICK, threads=(1, 1)), bits=8)
    keep_costs(tmp_path / "cost.json", probe_costs(str(model), tmp_path / "cost.json", twice, Target()))
    document: dict[str, Any] = json.loads((tmp_path / "cost.json").read_text())
    device = document["device"]
    table = read_costs(
        tmp_path / "cost.json", SHAPE, bits=8, group_size=32, threads=1, onnxruntime=device["onnxruntime"]
    )
    assert (table.threads, table.depth) == (1, 50) and len(document["threads"]) == 1
    assert set(table.attention) == {(1, 1), (2, 1)} and set(table.ffn) == {32, 64}
    whole = [LayerSizes(2, 1, 64)] * 4
    assert table.total_ms(whole) == pytest.approx(document["threads"][0]["step_ms"])
    printed = capsys.readouterr().out
    assert "one layer with 1 thread at 50 tokens:" in printed and "2 query, 1 KV heads" in printed
    assert not list((tmp_path / "temporary").glob("saap-costs-*"))


@pytest.mark.usefixtures("quick_probe")
def test_a_table_that_has_no_room_for_a_file_is_shown(model: Path) -> None:
    quick = ["-t", "1", "--depth", "50", "--set", "rounds=1", "--set", "seconds=0"]
    done = here("devices", "costs", model, "-o", "/dev/full", *quick, code=2)
    assert last_line(done) == "saap: /dev/full: No space left on device: make room there, or write elsewhere"
    assert "one layer with 1 thread at 50 tokens:" in done.stdout and "a step of the whole stack takes" in done.stdout
    assert "written" not in done.stdout


@pytest.mark.usefixtures("quick_probe")
def test_a_failure_leaves_no_files(model: Path, tmp_path: Path) -> None:
    with pytest.raises(costs.CostsError, match="a depth of 9999 cannot be probed"):
        probe_costs(model, tmp_path / "cost.json", CostsCommand(replace(QUICK, depth=9999)), Target())
    assert not (tmp_path / "cost.json").exists() and not list((tmp_path / "temporary").glob("saap-costs-*"))


def test_what_is_no_model_or_no_file_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model 'nothing'"):
        probe_costs("nothing", tmp_path / "cost.json", CostsCommand(QUICK), Target())
    with pytest.raises(UserError, match="is a directory: give the name of a file"):
        probe_costs(model, tmp_path, CostsCommand(QUICK), Target())
    with pytest.raises(UserError, match=r"cannot be written .*: give another place"):
        probe_costs(model, model / "config.json" / "cost.json", CostsCommand(QUICK), Target())


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    yield from running(tmp_path, monkeypatch)


@pytest.mark.usefixtures("quick_probe")
def test_a_board_is_probed_from_here(model: Path, tmp_path: Path, sshd: Sshd) -> None:
    said = list[str]()
    board = Target(sshd.url, BoardOptions(board_packages=True), said.append)
    there = probe_costs(model, tmp_path / "pi.json", ASKED, board)
    assert there.on == sshd.url and said == [] and not remains(sshd.cache)
    local = probe_costs(model, tmp_path / "here.json", ASKED, Target())
    assert local.on is None and local.stacks == there.stacks and local.model == there.model
    assert there.command == local.command and there.device["fingerprint"]
    costs.write_costs(tmp_path / "pi.json", there)
    assert costs.COSTS.read(tmp_path / "pi.json") == there
    table = read_costs(tmp_path / "pi.json", SHAPE, bits=8, group_size=32, threads=1)
    assert set(table.attention) == {(1, 1), (2, 1)} and set(table.ffn) == {32, 64}

    with pytest.raises(costs.CostsError, match="a depth of 99999 cannot be probed"):
        probe_costs(model, tmp_path / "other.json", CostsCommand(replace(QUICK, depth=99999), bits=8), board)
    with pytest.raises(BoardError, match=rf"{sshd.url}: 1024 threads"):
        probe_costs(model, tmp_path / "other.json", CostsCommand(replace(QUICK, threads=(1024,)), bits=8), board)
    assert not (tmp_path / "other.json").exists() and not remains(sshd.cache)
    assert not list((tmp_path / "temporary").glob("saap-costs-*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "saap bench"}, "no table of costs"),
        ({"model": {"hidden": 1}}, "hidden|model_type"),
        ({"threads": []}, "other thread counts"),
        ({"checksum": "sha256:0"}, "changed after it was written"),
    ],
)
def test_a_board_that_answers_something_else(model: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    (stack, *_) = write_probe_stacks(read_probe_model(model, 8, None), tmp_path)
    base = read_manifest(stack)
    bandwidth = Bandwidth(1, 1, [1e9])
    table = MeasuredCosts(
        n_threads=1, affinity=[0], step_ms=1.0, constant_ms=0.5, node_ms=None, attention=[AttentionCost(2, 1, 1.0)],
        ffn=[FfnCost(64, 1.0)], bandwidth=bandwidth, processes=[],
    )  # fmt: skip
    whole = asdict(costs.Costs("now", [], {}, {}, costs.described(base), 50, [], [table]))
    assert _costs("pi", with_checksum(whole), base, [1]).on == "pi"
    with pytest.raises(ValueError, match=told):
        _costs("pi", {**with_checksum(whole | change), **change}, base, [1])
    with pytest.raises(ValueError, match="costs of another model"):
        _costs("pi", whole | {"model": whole["model"] | {"hidden": 1}}, base, [1])
    for wrong in ({"attention": [{"query_heads": 2, "kv_heads": 1, "ms": "1"}]}, {"step_ms": None}, {"node_ms": "0"}):
        with pytest.raises(ValueError, match="Expected"):
            _costs("pi", whole | {"threads": [whole["threads"][0] | wrong]}, base, [1])


def test_options_of_a_board_that_contradict_themselves() -> None:
    done = here("devices", "costs", "x", "--on", "local://", "--wheels", "w", "--board-packages", code=2)
    assert "--wheels fills a venv there" in last_line(done)


def test_the_old_spelling_names_the_new_one() -> None:
    for words in (["--costs", "x", "-t", "1", "-o", "cost.json"], ["--costs=x"]):
        assert "`saap devices costs MODEL -o cost.json`" in last_line(here("devices", "probe", *words, code=2))


@pytest.mark.usefixtures("quick_probe")
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_layers_are_timed_in_llama_cpp(model: Path, tmp_path: Path, bits: int) -> None:
    try:
        python_with(["llama_cpp"], "this test", "llama-cpp-python")
    except UserError as error:
        pytest.skip(str(error))
    quick, out = replace(QUICK, engine="llama.cpp"), tmp_path / "cost.json"
    keep_costs(out, probe_costs(str(model), out, CostsCommand(quick, bits=bits), Target()))
    assert json.loads((tmp_path / "cost.json").read_text())["engine"] == "llama.cpp"
    table = read_costs(tmp_path / "cost.json", SHAPE, bits=bits, group_size=32, threads=1)
    assert set(table.attention) == {(1, 1), (2, 1)} and set(table.ffn) == {32, 64}


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_probe_of_llama_cpp_holds_the_layers_of_its_stack(model: Path, tmp_path: Path, bits: int) -> None:
    layers = [LayerSizes(2, 1, 64), LayerSizes(0, 0, 64), LayerSizes(2, 1, 0), LayerSizes(1, 1, 32)]
    write_probe_gguf(read_probe_model(model, bits), ProbeStack(layers, 96), tmp_path / "probe.gguf")
    header = read_header(tmp_path / "probe.gguf")
    told = {name: list(header.metadata[f"deci.{name}"]) for name in ("attention.head_count", "feed_forward_length")}
    assert told == {"attention.head_count": [2, 0, 2, 1], "feed_forward_length": [64, 64, 32, 32]}
    assert header.bits == bits and header.vocab_size == 96
    assert header.tensors["blk.3.attn_q.weight"].shape in ((32, 64), (64, 32))
    assert not [name for name in header.tensors if name.startswith("blk.1.attn")]


def test_another_engine_is_timed_here_and_only_where_it_holds_the_family(model: Path, tmp_path: Path) -> None:
    command = ["devices", "costs", model, "--engine", "llama.cpp", "-o", tmp_path / "c.json"]
    assert "--engine is for this host" in last_line(here(*command, "--on", "ssh://pi@board", code=2))
    for family in ("qwen3", "olmo2"):  # llama.cpp has another architecture for it; saap writes it for none
        (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": family}))
        assert f"models of {family} are not timed in llama.cpp" in last_line(here(*command, code=2))
