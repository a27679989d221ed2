"""What `saap run` hands to its steps, when a step counts as done, and what it records of each."""

import hashlib
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from support.command_line import here, refused
from support.cost_files import cost_file
from support.edited import edited
from support.fake_trees import plant
from support.no_pickles import no_pickles
from support.old_products import old_products

from export.gguf.llama_cpp import quantizer
from saap.base.costs import read_cost_file
from saap.base.errors import UserError
from saap.base.interpreters import PEER_PYTHON
from saap.base.options import arguments_of, build
from saap.cli.console import Console
from saap.cli.devices.fit import read_model
from saap.cli.run import RunOptions, run_needs, steps
from saap.cli.run.steps import Peer, Prune, Run, Tune, probe_costs, silence, steps_of
from saap.models.record import read_record
from saap.prune.pruning import budget_of
from saap.text.documents import EVALUATION_SAMPLE, TRAINING_SAMPLES


def options(**given):
    return build(RunOptions, given)


@pytest.fixture
def costs(tmp_path):
    return cost_file(tmp_path / "cost.json")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"The river rose by {i} centimetres, and bridge {i * 7} was closed." for i in range(900)))
    return path


def test_a_ratio_is_the_default_and_only_without_another_requirement(costs):
    assert RunOptions().prune.options.asked == {"ratio": 0.2}
    assert options(ratio=0.0).prune.options.asked == {"ratio": 0.0}  # refused later, not replaced
    timed = options(speedup=1.5, costs=costs, threads=2, method="flap").prune.options
    assert timed.asked == {"speedup": 1.5}
    assert (timed.costs, timed.threads, timed.method) == (costs, 2, "flap")
    assert options(threads=2).prune.options.threads is None  # of the bench only


def test_a_table_of_costs_that_has_become_too_large_is_not_hashed(costs, tmp_path):
    with costs.open("r+b") as file:
        file.truncate((256 << 20) + 1)  # takes no room
    run = SimpleNamespace(options=options(speedup=1.5, costs=costs), out=tmp_path, model="dense", dense=[])
    with pytest.raises(UserError, match=r"cost.json is damaged \(larger than 256 MiB\): "):
        Prune(run, None)


def test_what_several_steps_take_is_given_once():
    asked = options(bits=8, group_size=64, seed=3, calibration="c.txt", data="d.txt")
    pruning, tuning = asked.prune.options, asked.tune("dense")
    assert (pruning.bits, pruning.group_size, pruning.seed) == (8, 64, 3)
    assert (tuning.options.bits, tuning.options.group_size, tuning.options.training.seed) == (8, 64, 3)
    assert (tuning.teacher, tuning.data) == ("dense", "d.txt")
    assert options(teacher="other").tune("dense").teacher == "other"
    dense, slim = asked.export(tuned=False), asked.export(tuned=True)
    assert (dense.bits, dense.group_size, dense.text) == (8, 64, "c.txt")
    assert (slim.bits, slim.group_size, slim.text) == (None, None, "c.txt")  # as tuned
    assert asked.bundles == ("dense-int8", "slim-int8")


def test_the_words_of_a_command(costs):
    told = arguments_of(options(ms_per_token=4.5, costs=costs, threads=1, compensate="bias", seed=3).prune)
    timed = ["--ms-per-token", "4.5", "--costs", str(costs), "--threads", "1"]
    assert told == [*timed, "--compensate", "bias", "--seed", "3"]
    assert arguments_of(options(slices="output").prune) == ["--ratio", "0.2", "--set", "slices=output"]
    assert arguments_of(options(group_size=64).tune("a model")) == ["--group-size", "64", "--teacher", "a model"]


def test_pruning_is_done_anew_where_its_settings_changed(tiny_model, tmp_path, text, costs):
    model, out = tiny_model(), tmp_path / "demo"
    out.mkdir()

    def step(**changes):
        """Whether the step was done, by the plan in run.json and the record of the slim directory."""
        asked = options(**{"calibration": str(text), "sequences": 4, "length": 16, **changes})
        with Console() as console:
            run = Run(str(model), model, out, asked, console)
            before = run.file["steps"]
            run.do(Prune(run, None), "[1/1]")
        record = read_record(out / "slim")
        assert run.file["plan"]["asked"] == record["plan"]["asked"]
        assert run.file["plan"]["reasons"]["unit"] == record["plan"]["reasons"]["unit"]
        return run.file["steps"] != before, record

    done, record = step()
    assert done and record["plan"]["asked"] == {"ratio": 0.2} and record["method"] == "saap"
    assert not step()[0]
    done, record = step(method="wanda_sp")
    assert done and record["method"] == "wanda_sp"
    assert not step(method="wanda_sp")[0]
    assert step(method="wanda_sp", compensate="bias")[1]["options"]["compensate"] == "bias"
    done, record = step(ratio=0.4, keep=frozenset({"blocks"}))
    assert done and record["options"]["keep"] == ["blocks"] and not step(ratio=0.4, keep=frozenset({"blocks"}))[0]
    done, record = step(max_bytes=210_000)
    assert done and record["plan"]["achieved"]["bytes"] <= 210_000
    timed = {"speedup": 1.5, "costs": costs}
    assert step(**timed)[0] and not step(**timed)[0]
    table = json.loads(costs.read_text())
    table["threads"][0]["constant_ms"] = 1.5
    costs.write_text(json.dumps(table))
    assert step(**timed)[0]  # another table under the same name


def test_a_run_for_a_speed_here_times_the_layers_first_and_once(tiny_model, tmp_path, monkeypatch, capsys):
    model, out = tiny_model(max_position_embeddings=512), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("saap.cli.devices.costs.QUICK_ROUNDS", 1)
    monkeypatch.setattr("saap.cli.devices.costs.QUICK_SECONDS", 0.0)
    timed = options(threads=1).timed_here(out / "cost.json")
    assert timed.prune.options.asked == {"speedup": 1.3} and timed.timed_here(tmp_path / "other") is timed
    for given in ({"ratio": 0.2}, {"profile": "raspberry-pi-5"}):
        assert options(**given).timed_here(out / "cost.json") == options(**given)
    busy = iter([[], ["waited"], ["waited"], ["waited"], []])

    def measured(*arguments):
        reasons, table = next(busy), probe_costs(*arguments)
        layers = [replace(each, constant_ms=1e-6) for each in table.threads]  # so short a table is mostly noise
        return replace(table, threads=layers, status="INVALID" if reasons else "OK", reasons=reasons)

    monkeypatch.setattr(steps, "probe_costs", measured)
    monkeypatch.setattr("saap.cli.run.steps_of", lambda job: steps_of(job)[:1])
    monkeypatch.setattr("saap.cli.run.finish", lambda *_: None)
    for again in range(2):
        done = here("run", model, "-o", out, "--threads", "1").stderr
        assert done.count("done before") == again and "the model is pruned to 1.3 times its speed here" in done
    with Console() as console:
        job = Run(str(model), model, out, timed, console)
        first, second, *_ = steps_of(job)
        assert second.name == "prune"
        (out / "cost.json").unlink()
        with pytest.raises(UserError, match=f"too busy .*: saap run {model} -o {out} --ratio 0.2"):
            job.do(first, "[1]")
        assert not (out / "cost.json").exists()
        job.do(first, "[1]")
    assert read_cost_file(out / "cost.json").threads[0].n_threads == 1
    words = shlex.split(job.file["steps"][0]["command"])
    assert words[:3] == ["saap", "devices", "costs"] and "--quick" in words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ratio nan", "is not allowed: give a number between 0 and 1"),
        ("--ratio 0.2 --max-params 1M", "give one requirement"),
        ("--speedup 1.5 --for raspberry-pi-5", "--speedup needs --costs FILE"),
        ("--costs COSTS", "--costs is for --speedup and --ms-per-token"),
        ("--max-bytes 30kB", "the smallest that these options allow is"),
        ("--speedup 1.5 --costs COSTS --threads 2", "holds costs for 1 thread, it has none for 2"),
        ("--method best", "--method best is not allowed: give saap"),
        ("--method flap --set keep=blocks", "--keep blocks is for the method saap"),
        ("--threads 1000", "1000 threads cannot be used: this process has"),
        (
            "--tokens 512",
            "--tokens 512 is less than a step needs, 1024 (4 sequences of 256): give --tokens 1024 or more",
        ),
        ("--group-size 64", "the hidden size is 96 wide, which groups of 64 do not divide: give"),
        ("--set length=999", "--length 999 is more than the 512 positions of"),
        ("--set chunk=999", "chunk 999 is more than the 512 positions of"),
        ("--text no.txt", "no text 'no.txt'"),
        (
            "--data SHORT",
            "224 rows of 256 need 57344: give more text, or fewer --tokens",
        ),
        (
            "--calibration SHORT",
            "64 rows of 256 need 16384: give more text, or fewer --sequences or a smaller --length",
        ),
        ("--teacher nobody", "no model 'nobody'"),
        ("--set kind=chat", "chat needs conversations"),
        ("--for toaster", "no device 'toaster': choose one of generic-arm64, "),
        ("--memory 4GiB", "--memory is for the device of --for: leave it out, or name one"),
        ("--for rk3588", "how much memory rk3588 has is not known: say it with --memory"),
        ("--for raspberry-pi-4 --bits 8", "--bits 8 has no kernel on Raspberry Pi 4, which lacks dotprod: give 4"),
        ("--for raspberry-pi-4 --set head_bits=8", "head_bits 8 has no kernel on Raspberry Pi 4, which lacks dotprod"),
        ("--for jetson-xavier-nx", "it needs ONNX Runtime 1.23, there it is 1.19.2 (JetPack 5, Python 3.8): install"),
        ("--for raspberry-pi-5 --set context=999", "a context of 999 tokens: this model holds 1 to 512"),
        ("--for raspberry-pi-5 --memory 64MiB --ratio 0.4", "has room for none beside a context of 512 tokens: give"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_made(tiny_model, tmp_path, costs, options, message):
    (tmp_path / "short.txt").write_text("Short.")
    options = options.replace("COSTS", str(costs)).replace("SHORT", str(tmp_path / "short.txt")).split()
    assert message in refused("run", tiny_model(max_position_embeddings=512), "-o", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_run_takes_over_no_directory_but_its_own(tmp_path):
    old = old_products()
    for name in ("slim", "bundle"):
        shutil.copytree(old / name, tmp_path / name)
    shutil.copytree(old / "slim", tmp_path / "other/slim")
    (tmp_path / "other/run.json").write_text(json.dumps({"model": "another", "steps": []}))
    shutil.copytree(tmp_path / "other", tmp_path / "mixed")
    (tmp_path / "mixed/run.json").write_text(json.dumps({"model": str(old / "dense"), "steps": []}))
    (tmp_path / "mixed/slim/saap.json").unlink()  # then it is something else of the user's
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, message in {
        "slim": "slim holds other files: give a directory that is new, empty, or the directory of a run",
        "bundle": "bundle holds other files",
        "other": "other holds a run of another, not of",
        "mixed": "mixed/slim holds other files",
    }.items():
        assert message in refused("run", old / "dense", "-o", tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_cannot_be_exported_or_judged_is_refused_before_it_is_pruned(tiny_model, tmp_path):
    path, out, text = tiny_model(head_dim=20), tmp_path / "out", tmp_path / "text.txt"
    assert "a head size of 20 cannot be exported" in refused("run", path, "-o", out)
    long_enough = "and this line is long enough to tell it apart from others."
    text.write_text("\n".join(f"{i} is a number that follows {i - 1}, {long_enough}" for i in range(900)))
    same = ["--calibration", text, "--data", text, "--text", text]
    assert "same text" in refused("run", tiny_model("other"), "-o", out, *same)
    assert not out.exists()


def test_a_peer_that_fails_is_left_out_and_tried_again(tiny_model, tmp_path, monkeypatch, capsys):
    model, python = tiny_model(), tmp_path / "python"
    dies = "import os, sys\nprint('GGML_ASSERT(x) failed', file=sys.stderr)\nos.abort()\n"
    plant(tmp_path, {"packages/llama_cpp/__init__.py": dies})
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(PEER_PYTHON, str(python))
    with Console() as console:
        run = Run(str(model), model, tmp_path, RunOptions(), console)
        peer = Peer(run)
        peer.check()
        peer.attempt(lambda: run.do(peer, "[1/1]"))
    assert peer.failure and peer.specs == {}
    told = "  llama.cpp is not compared with: llama.cpp wrote no Q4_0 of model.gguf: killed by SIGABRT: GGML_ASSERT(x)"
    assert told in capsys.readouterr().err
    assert run.file["steps"] == [] and not (tmp_path / "dense-Q4_0.gguf").exists()


def test_a_model_that_llama_cpp_does_not_hold_is_not_compared_with_it(tiny_family, tmp_path):
    model = tiny_family("olmo2")
    with pytest.raises(UserError, match="is of type 'olmo2': GGUF files are written of"), Console() as console:
        Peer(Run(str(model), model, tmp_path, RunOptions(), console)).check()


def weights(out):
    """The hash of every file of weights and graphs, and each model's plan."""
    files = [path for path in sorted(out.rglob("*")) if path.suffix in (".safetensors", ".onnx", ".data")]
    assert len(files) >= 6
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} | {
        name: read_record(out / name)["plan"]["layers"] for name in ("slim", "tuned")
    }


def test_the_disk_that_a_run_needs_counts_the_peer(tiny_model):
    model, asked = tiny_model(), options(ratio=0.2)
    budget = budget_of(model, asked.prune.options)
    with_peer, alone = (
        max(needs.disk_bytes for needs in run_needs(model, asked, peer=peer).values()) for peer in (True, False)
    )
    assert with_peer - alone > 2 * budget.dense.parameters


def peer_is_here():
    try:
        return bool(quantizer())
    except UserError:
        return False


PEER = ["export dense-Q4_0.gguf"] if peer_is_here() else []
NAMES = [
    "prune", "tune", "tune dense", "export dense-int4", "export slim-int4", *PEER, "evaluate", "bench with 1 thread",
    "texts",
]  # fmt: skip


def test_a_run_resumes_and_each_of_its_steps_does_the_same_alone(tiny_model, tmp_path, text, monkeypatch):
    """To a size, for a board, by another method, on the samples; with a space in a path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAAP_DATA", raising=False)
    (tmp_path / "my texts").mkdir()
    text = text.rename("my texts/learn.txt")
    out = Path("my demo")
    few = [word for each in ("sequences=8", "length=32", "chunk=64", "max_chunks=4") for word in ("--set", each)]
    arguments = ["run", tiny_model(max_position_embeddings=512), "-o", out, "--max-bytes", "242kB", "--method", "flap",
                 "--for", "raspberry-pi-4", "--memory", "4GiB",
                 "--data", text, "--tokens", "1024", "--seed", "3", "--repetitions", "1", "--threads", "1", *few,
                 "--set", "learning_rate=0.01"]  # fmt: skip
    with no_pickles(tmp_path / "watch"):
        done = here(*arguments)
    said = done.stdout
    assert bool(PEER) != ("  llama.cpp is not compared with: llama.cpp's quantizer needs llama_cpp" in done.stderr)
    assert "slim-int4, pp128+tg128, 1 thread: decode" in said or "not comparable with dense-int4" in said
    sizes = [(out / name / "model.onnx.data").stat().st_size for name in ("slim-int4", "dense-int4")]
    assert sizes[0] <= 242_000 < sizes[1]
    page = (out / "report.html").read_text()
    assert "slim-int4" in page and "<svg" in page and "--max-bytes 242000 --method flap" in page
    assert read_record(out / "slim")["lineage"]["calibration"]["source"] == TRAINING_SAMPLES
    assert read_model(out / "slim-int4").accuracy_level == 0  # of kernels without dotprod
    here("devices", "check", out / "slim-int4", "--device", "raspberry-pi-4", "--memory", "4GiB")
    assert "On Raspberry Pi 4 slim-int4 takes 7" in said and "with a context of 512 tokens (93% of the 4 GiB" in said
    assert "On Raspberry Pi 4 slim-int4 takes 7" in page
    assert "scp -r 'my demo/slim-int4' USER@BOARD:" in said and "saap generate slim-int4 --context 512\n" in said

    run, made_by_run = json.loads((out / "run.json").read_text()), weights(out)
    assert [step["name"] for step in run["steps"]] == NAMES
    rows = {row["name"]: row for row in run["quality"]["rows"]}
    assert [list(text["outputs"]) for text in run["texts"]] == [["dense-int4", "slim-int4"]] * 3
    assert all(text["prompt"] in page for text in run["texts"])
    peers = {"dense-Q4_0 (llama.cpp)", "slim-int4@llama.cpp"} if PEER else set()
    others = {name for name in rows if not name.endswith("@openvino")}  # which is measured where it is installed
    assert others == {"dense fp32", "slim fp32, untuned", "dense-int4", "slim-int4"} | peers
    assert all(name in page for name in peers)
    assert run["quality"]["protocol"]["text"] == EVALUATION_SAMPLE
    assert all(r["perplexity"] > 1 and r["kl"] is not None and 0 <= r["top1"] <= 1 for r in rows.values())

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert here(*arguments).stderr.count("done before") == len(NAMES)
    shutil.rmtree(out / "slim-int4")
    assert here(*arguments).stderr.count("done before") == len(NAMES) - 1
    assert (out / "slim-int4/bundle.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before

    commands = [shlex.split(step["command"]) for step in run["steps"]]
    assert [words[:2] for words in commands] == [
        ["saap", name]
        for name in ("prune", "tune", "tune", "export", "export", *["export"] * len(PEER), "eval", "bench", "generate")
    ]
    for name in ("slim", "tuned", "dense-tuned", "dense-int4", "slim-int4"):
        shutil.rmtree(out / name)
    (out / "bench-1-thread.json").unlink()
    with no_pickles(tmp_path / "watch"):
        done = [here(*words[1:], *(["--json", "q.json"] if words[1] == "eval" else [])) for words in commands]
    assert weights(out) == made_by_run
    for row in json.loads(Path("q.json").read_text())["rows"]:
        name = Path(row["name"]).name
        renamed = {"slim": "slim fp32, untuned", "dense-Q4_0.gguf": "dense-Q4_0 (llama.cpp)"}
        name = renamed.get(name, name if name in rows else "dense fp32")
        assert row["kl"] == pytest.approx(rows[name]["kl"], abs=1e-6)
    benched = json.loads((out / "bench-1-thread.json").read_text())["measurements"]
    assert {m["name"] for m in benched} >= {"dense-int4", "slim-int4"} | peers
    assert done[-1].stdout.rstrip("\n") == run["texts"][0]["outputs"]["slim-int4"].rstrip("\n")
    assert "tok/s" in done[-1].stderr

    judge = tmp_path / "judge.txt"
    lines = (f"She sold {i} boats in a year that had {i + 3} storms and some wind." for i in range(60))
    judge.write_text("\n".join(lines))
    here("eval", out / "tuned", out / "slim-int4", "--text", judge, "--chunk", "64", "--max-chunks", "4", "--json", "j")
    tuned, bundle = json.loads(Path("j").read_text())["rows"]
    assert tuned["nll"] == pytest.approx(bundle["nll"], abs=0.02) and bundle["perplexity"] > 1

    learnt = [read_record(out / name)["tuning"]["text"] for name in ("tuned", "dense-tuned")]
    assert learnt[0] == learnt[1]  # what is compared saw the same text
    card = ModelCard.load(out / "README.md")
    assert card.data.tags[0] == "saap" and "| slim-int4 |" in card.content and "saap tune" in card.content
    assert "slim-int4 against dense-int4: " in card.content
    assert "On Raspberry Pi 4 slim-int4 takes" in card.content and "scp -r slim-int4 USER@BOARD:" in card.content
    here("report", out, "-o", "page.html")
    assert Path("page.html").stat().st_size > 10_000
    data = bytearray((out / "slim-int4/model.onnx.data").read_bytes())
    data[-1] ^= 1
    (out / "slim-int4/model.onnx.data").write_bytes(data)
    for words in (
        ["generate", out / "slim-int4", "hi"],
        ["bench", out / "slim-int4"],
        commands[NAMES.index("evaluate")][1:],
    ):
        assert "does not match the hash" in refused(*words)


def test_the_dense_model_skips_what_pruning_read_whatever_was_planned(tiny_model, tmp_path):
    model = tiny_model()
    shutil.copytree(old_products() / "slim", tmp_path / "slim")
    edited(tmp_path / "slim/saap.json", lineage={"calibration": {"sequences": 50, "tokens": 256}})
    with Console() as console:
        dense = Tune(Run(str(model), model, tmp_path, options(tokens=8192), console), None)
    dense.prepare()
    assert dense.options.options.skip == 50 and "skip=50" in dense.command


def test_a_quick_run_takes_less_text_but_for_what_is_given():
    plain, quick = options(), options(quick=True).shortened
    assert plain.shortened == plain and not quick.quick
    assert quick.repetitions < plain.repetitions and quick.threads == 1
    assert quick.tuning.options.tokens < plain.tuning.options.tokens
    given = options(quick=True, tokens=12_288, max_chunks=30).shortened
    assert given.tuning.options.tokens == 12_288 and given.max_chunks == 30


def test_a_model_that_repeats_itself_is_told_of():
    assert silence([0.0, 0.1], [0.2, 0.4]) == "" and silence([0.9], [0.8]) == ""  # as the dense one does
    assert silence([0.0, 0.1], [0.9, 1.0]).startswith(
        "the slim model does not answer any more: 95% of what it says was said before (5% by the dense one; 50% are"
    )


def test_the_dense_model_is_taken_in_its_fastest_group_size(tiny_model, tmp_path, monkeypatch):
    """By the table of costs; the default one is then exported too, for its speed."""
    model, out = tiny_model(hidden_size=192, max_position_embeddings=512), tmp_path / "out"
    monkeypatch.setattr("saap.cli.devices.costs.QUICK_ROUNDS", 1)
    monkeypatch.setattr("saap.cli.devices.costs.QUICK_SECONDS", 0.0)
    here("devices", "costs", model, "-o", tmp_path / "cost.json", "-t", 1, "--quick")
    for factor, fastest in ((0.5, 64), (2.0, 32)):
        table = json.loads((tmp_path / "cost.json").read_text())
        table.pop("checksum", None)
        (costs,) = table["threads"]
        form = next(form for form in costs["forms"] if (form["bits"], form["group_size"]) == (4, 64))
        form["attention_ms"] = factor * max(each["ms"] for each in costs["attention"])
        form["ffn_ms"] = factor * max(each["ms"] for each in costs["ffn"])
        form["outside_ms"] = factor * costs["constant_ms"]
        costs["forms"] = [form]
        table |= {"status": "OK", "reasons": []}  # whatever else runs here
        (tmp_path / "changed.json").write_text(json.dumps(table))
        with Console() as console:
            run = options(threads=1, speedup=1.2, costs=tmp_path / "changed.json")
            job = Run(str(model), model, out, run, console)
            (plain,) = [step for step in steps_of(job) if isinstance(step, steps.Plain)]
            plain.prepare()
        assert (job.dense_group_size, plain.needless) == (fastest, fastest == 32)
        assert plain.specs == ({} if fastest == 32 else {"dense-int4-g32": str(out / "dense-int4-g32")})
