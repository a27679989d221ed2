"""What `saap run` hands to the pruning step, and when that step counts as done."""

from __future__ import annotations

import json

import pytest
from support.command_line import here, refused

from saap.cli import run as pipeline
from saap.cli.console import Console
from saap.cli.run import RunOptions
from saap.models.checkpoint import read_record
from tests.saap.prune.search.test_budget import cost_file


@pytest.fixture
def costs(tmp_path):
    return cost_file(tmp_path / "cost.json")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"The river rose by {i} centimetres, and bridge {i * 7} was closed." for i in range(900)))
    return path


def test_a_ratio_is_the_default_and_only_without_another_requirement(costs):
    assert RunOptions().asked == {"ratio": 0.2}
    assert RunOptions(ratio=0.0).asked == {"ratio": 0.0}  # refused later, not replaced
    timed = RunOptions(speedup=1.5, costs=costs, threads=2, method="flap").prune_settings()
    assert "ratio" not in timed
    assert (timed["speedup"], timed["costs"], timed["threads"], timed["method"]) == (1.5, costs, 2, "flap")
    assert RunOptions(threads=2).prune_settings()["threads"] is None  # of the bench only


def test_the_command_alone(costs, tmp_path):
    options = RunOptions(ms_per_token=4.5, costs=costs, threads=1, compensate="bias", seed=3)
    told = options.prune_command("a model", tmp_path / "slim")
    timed = f"--ms-per-token 4.5 --costs {costs} --threads 1"
    assert told == f"saap prune 'a model' -o {tmp_path}/slim {timed} --compensate bias --seed 3"
    told = RunOptions(drop_layers=2).prune_command("m", tmp_path)
    assert told == f"saap prune m -o {tmp_path} --ratio 0.2 --drop-layers 2 --seed 0"
    assert RunOptions().prune_command("m", tmp_path) == f"saap prune m -o {tmp_path} --ratio 0.2 --seed 0"


def test_pruning_is_done_anew_where_its_settings_changed(tiny_model, tmp_path, text, costs):
    model, out = tiny_model(), tmp_path / "demo"
    out.mkdir()

    def step(**changes):
        """Whether the step was done, by the plan in run.json and the record of the slim directory."""
        options = RunOptions(**{"calibration": str(text), "sequences": 4, "length": 16, **changes})
        with Console() as console:
            state = pipeline._State(out, "tiny", console)
            before = state.run["steps"]
            pipeline._prune(state, "tiny", model, options, "dense")
        record = read_record(out / "slim")
        assert state.run["plan"]["asked"] == record["plan"]["asked"]
        assert state.run["plan"]["reasons"]["unit"] == record["plan"]["reasons"]["unit"]
        return state.run["steps"] != before, record

    done, record = step()
    assert done and record["plan"]["asked"] == {"ratio": 0.2} and record["method"] == "saap"
    assert not step()[0]
    done, record = step(method="wanda_sp")
    assert done and record["method"] == "wanda_sp"
    assert not step(method="wanda_sp")[0]
    assert step(method="wanda_sp", compensate="bias")[1]["options"]["compensate"] == "bias"
    done, record = step(ratio=0.4, drop_layers=1)
    assert done and record["options"]["drop_layers"] == 1 and not step(ratio=0.4, drop_layers=1)[0]
    done, record = step(max_bytes=210_000)
    assert done and record["plan"]["achieved"]["bytes"] <= 210_000
    timed = {"speedup": 1.5, "costs": costs}
    assert step(**timed)[0] and not step(**timed)[0]
    table = json.loads(costs.read_text())
    table["threads"][0]["constant_ms"] = 1.5
    costs.write_text(json.dumps(table))
    assert step(**timed)[0]  # another table under the same name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0.2", "--max-params", "1M"], "give one requirement"),
        (["--speedup", "1.5"], "--speedup needs --costs FILE"),
        (["--costs", "COSTS"], "--costs is for --speedup and --ms-per-token"),
        (["--max-bytes", "80kB"], "the smallest that these options allow is"),
        (["--speedup", "1.5", "--costs", "COSTS", "--threads", "4"], "holds costs for 1 threads, it has none for 4"),
        (["--method", "best"], "'best' is not one of"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_made(tiny_model, tmp_path, costs, options, message):
    options = [costs if option == "COSTS" else option for option in options]
    assert message in refused("run", tiny_model(), "-o", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_refused_before_it_is_pruned(tiny_model, tmp_path):
    path = tiny_model(head_dim=20)
    assert "a head size of 20 cannot be exported" in refused("run", path, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_to_a_size_by_a_baseline(tiny_model, tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text(
        "\n".join(f"She sold {i} boats in a year that had {i + 3} storms and some wind." for i in range(300))
    )
    out = tmp_path / "demo"
    here("run", tiny_model(max_position_embeddings=512), "-o", out, "--max-bytes", "242kB", "--method", "flap",
         "--calibration", text, "--data", text, "--text", other, "--tokens", "1024", "--repetitions", "1",
         "--threads", "1")  # fmt: skip
    assert (
        (out / "slim-int4/model.onnx.data").stat().st_size
        <= 242_000
        < (out / "dense-int4/model.onnx.data").stat().st_size
    )
    page = (out / "report.html").read_text()
    assert "--max-bytes 242000 --method flap" in page and "KV groups" in page
