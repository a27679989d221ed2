"""The command line as a person meets it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support.command_line import here, refused, saap

from saap.cli import main as cli
from saap.models.checkpoint import load_model


def test_help_is_instant_and_has_no_torch():
    script = (
        "import sys\nfrom saap.cli.main import cli\ntry:\n cli(['--help'])\nexcept SystemExit:\n pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'onnxruntime', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        saap("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3, times  # of the processor, which other work does not take from it


def test_help_is_one_screen(monkeypatch):
    """At most 45 lines of at most 100 columns, for every command."""
    monkeypatch.setenv("COLUMNS", "100")
    context, names = click.Context(cli.cli), []
    for name in cli.cli.list_commands(context):
        command = cli.cli.get_command(context, name)
        group = isinstance(command, click.Group)
        names += [[name], *([name, below] for below in (command.list_commands(context) if group else ()))]
    assert len(names) > 15
    for words in names:
        lines = here(*words, "--help").stdout.splitlines()
        assert len(lines) <= 45 and max(map(len, lines)) <= 100, (words, len(lines), max(lines, key=len))


@pytest.mark.parametrize(
    "command",
    ["run", "prune", "tune", "export", "eval", "generate", "bench", "compare", "report", "devices list", "devices show",
     "devices probe"],
)  # fmt: skip
def test_every_command_shows_an_example(command):
    assert f"saap {command}" in here(*command.split(), "--help").stdout.split("Example:")[1]


def test_devices():
    assert "raspberry-pi-5" in here("devices", "list").stdout
    shown = here("devices", "show", "raspberry-pi-5").stdout
    assert "B/s" in shown and "vendor" in shown
    probed = json.loads(here("devices", "probe", "--json").stdout)
    assert len(probed["fingerprint"]) == 16
    assert "unknown device" in refused("devices", "show", "toaster").lower() or "toaster" in refused(
        "devices", "show", "toaster"
    )


@pytest.mark.parametrize("ratio", ["0", "1", "-0.5", "nan"])
def test_ratios(tmp_path, ratio):
    for command in ("prune", "run"):
        assert "is not allowed: give a number between 0 and 1" in refused(
            command, "whatever", "-o", tmp_path / "out", "--ratio", ratio
        )
    assert not (tmp_path / "out").exists()


def test_bad_models(tmp_path, tiny_model):
    out = tmp_path / "out"
    assert "no model 'nonsense'" in refused("prune", "nonsense", "-o", out, "--ratio", "0.2")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("prune", tmp_path / "empty", "-o", out, "--ratio", "0.2")
    strange = tiny_model("strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "'gpt2' is not supported" in refused("prune", strange, "-o", out, "--ratio", "0.2")
    assert "no config.json" in refused("export", tmp_path / "empty", "-o", out)
    assert "not a bundle" in refused("generate", tmp_path / "empty", "hello")
    assert "not a bundle" in refused("bench", tmp_path / "empty")
    assert not out.exists()


def test_an_output_that_holds_something_else(tmp_path, tiny_model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    path = tiny_model()
    for command in (["prune", path, "--ratio", "0.2"], ["tune", path], ["export", path], ["run", path]):
        assert "holds other files" in refused(command[0], *command[1:], "-o", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_no_text(tmp_path, tiny_model):
    message = refused(
        "prune", tiny_model(), "-o", tmp_path / "out", "--ratio", "0.2", "--calibration", tmp_path / "no.txt"
    )
    assert "no text" in message
    assert not (tmp_path / "out").exists()


def test_nothing_may_be_evaluated_on_what_it_was_tuned_on(tmp_path, tiny_model):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(
            f"{i} is a number that follows {i - 1}, and this line is long enough to tell it apart from others."
            for i in range(400)
        )
    )
    message = refused(
        "run", tiny_model(), "-o", tmp_path / "out", "--calibration", text, "--data", text, "--text", text
    )
    assert "same text" in message


def test_a_missing_package_names_the_extra(tmp_path, tiny_model):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    message = refused(
        "prune", tiny_model(), "-o", tmp_path / "out", "--ratio", "0.2", call=saap, env={"PYTHONPATH": str(tmp_path)}
    )
    assert "pip install 'saap[prune]'" in message


def test_a_package_that_shadows_ours_is_refused(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/__init__.py").write_text("")
    script = Path(sys.executable).parent / "saap"
    done = subprocess.run(
        [script, "--help"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "another package shadows it" in done.stderr


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n".join(
            f"The river rose by {i} centimetres, and the bridge with number {i * 7} was closed." for i in range(900)
        )
    )
    return path


@pytest.fixture
def evaluation_file(tmp_path):
    path = tmp_path / "evaluation.txt"
    path.write_text(
        "\n".join(f"She sold {i} boats to the harbour master in a year that had {i + 3} storms." for i in range(300))
    )
    return path


FEW = [word for each in ("sequences=8", "length=64", "chunk=64", "max_chunks=8") for word in ("--set", each)]


def run_arguments(model, out, text_file, evaluation_file):
    return ["run", model, "-o", out, "--ratio", "0.3", "--calibration", text_file, "--data", text_file, "--text",
            evaluation_file, "--tokens", "1024", "--repetitions", "3", "--threads", "1", *FEW]  # fmt: skip


def test_run_ends_with_a_table_and_a_page_and_resumes(tmp_path, tiny_model, text_file, evaluation_file):
    model = tiny_model(max_position_embeddings=512)
    out = tmp_path / "demo"
    arguments = run_arguments(model, out, text_file, evaluation_file)
    done = here(*arguments)
    assert "slim-int4, pp128+tg128, 1 thread: decode" in done.stdout or "not comparable with dense-int4" in done.stdout
    assert "perplexity" in done.stdout
    page = (out / "report.html").read_text()
    assert "slim-int4" in page and "<svg" in page
    run = json.loads((out / "run.json").read_text())
    names = ["prune", "tune", "export dense-int4", "export slim-int4", "evaluate", "bench with 1 thread", "texts"]
    assert [step["name"] for step in run["steps"]] == names
    assert {row["name"] for row in run["quality"]["rows"]} == {
        "dense fp32",
        "slim fp32, untuned",
        "dense-int4",
        "slim-int4",
    }
    assert all(0 <= row["top1"] <= 1 and row["perplexity"] > 1 for row in run["quality"]["rows"])
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}

    again = here(*arguments)
    assert again.stderr.count("done before") == len(names)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before

    # A step whose output is gone is repeated; the ones before it are not.
    shutil.rmtree(out / "slim-int4")
    third = here(*arguments)
    assert third.stderr.count("done before") == len(names) - 1
    assert (out / "slim-int4/bundle.json").is_file()

    text = here("generate", out / "slim-int4", "Hello", "--max-tokens", "5", "--threads", "1")
    assert ("tok/s" in text.stderr and "5 tokens" in text.stderr) or "eos" in text.stderr
    here("report", out, "-o", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000
    compared = here("compare", out / "bench-1.json", out / "bench-1.json", code=saap_compare_code(out))
    assert "dense-int4" in compared.stdout


def saap_compare_code(out):
    """A result compared with itself is the same (0), unless the machine was too busy for it to be valid (3)."""
    statuses = [m["status"] for m in json.loads((out / "bench-1.json").read_text())["measurements"]]
    return 3 if "INVALID" in statuses else 0


def test_without_any_text_the_model_writes_its_own_and_perplexity_is_not_shown(tmp_path, tiny_model, monkeypatch):
    monkeypatch.delenv("SAAP_DATA", raising=False)
    model = tiny_model(max_position_embeddings=512)
    here("run", model, "-o", tmp_path / "demo", "--tokens", "1024", "--repetitions", "1", "--threads", "1", *FEW)
    run = json.loads((tmp_path / "demo/run.json").read_text())
    assert run["quality"]["protocol"]["self_written"]
    assert all(row["perplexity"] is None and row["kl"] is not None for row in run["quality"]["rows"])
    lineage = json.loads((tmp_path / "demo/slim/saap.json").read_text())["lineage"]
    assert lineage["calibration"]["source"].startswith("written by the dense model")


def test_single_commands_by_hand(tmp_path, tiny_model, text_file, evaluation_file):
    model = tiny_model(max_position_embeddings=512)
    here("prune", model, "-o", tmp_path / "slim", "--ratio", "0.3", "--keep-layers", "2", "--modules",
         "--calibration", text_file, "--sequences", "8", "--length", "32")  # fmt: skip
    here("tune", tmp_path / "slim", "-o", tmp_path / "tuned", "--data", text_file, "--tokens", "512", "--length", "64")
    here("export", tmp_path / "tuned", "-o", tmp_path / "bundle", "--text", text_file)
    result = tmp_path / "quality.json"
    here("eval", tmp_path / "tuned", tmp_path / "bundle", "--reference", model, "--text", evaluation_file, "--chunk",
         "64", "--max-chunks", "8", "--json", result)  # fmt: skip
    rows = {row["name"]: row for row in json.loads(result.read_text())["rows"]}
    tuned, bundle = rows[str(tmp_path / "tuned")], rows[str(tmp_path / "bundle")]
    assert tuned["nll"] == pytest.approx(bundle["nll"], abs=0.02)
    here("bench", tmp_path / "bundle", f"torch:{tmp_path / 'slim'}", "-p", "8", "-n", "8", "-t", "1", "-r", "1",
         "--no-cold", "--json", tmp_path / "bench.json")  # fmt: skip
    assert len(json.loads((tmp_path / "bench.json").read_text())["measurements"]) == 2
    data = bytearray((tmp_path / "bundle/model.onnx.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bundle/model.onnx.data").write_bytes(data)
    for command in (
        ["generate", tmp_path / "bundle", "hi"],
        ["bench", tmp_path / "bundle"],
        ["eval", tmp_path / "bundle", "--text", evaluation_file],
    ):
        assert "does not match the hash" in refused(*command)
    assert load_model(tmp_path / "slim").config.slim_layers


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_that_a_library_dresses_up_is_told_as_one(late: bool) -> None:
    """transformers makes "could not import" of it while it imports; late, the interpreter's own end is cut."""
    code = """
import atexit, os, signal
from saap.cli import main as cli

def cut():
    os.kill(os.getpid(), signal.SIGINT)

def library():
    try:
        cut()
    except KeyboardInterrupt as error:
        raise ModuleNotFoundError("Could not import module 'X'. Are this object's requirements defined?") from error

if {late}:
    atexit.register(cut)
cli.check_packages = (lambda: cli.fail("done", 2)) if {late} else library
cli.main()
"""
    command = [sys.executable, "-c", code.replace("{late}", str(late))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = "saap: done\n" if late else "saap: interrupted; run the same command again\n"
    assert (done.returncode, done.stderr) == (2 if late else 130, said)


def test_export_takes_what_prune_takes(tiny_model, tmp_path):
    from export.bundle.manifest import verify_files
    from export.gguf.write import export_gguf

    export_gguf(tiny_model(vocab_size=320), tmp_path / "model.gguf", kind="F32")
    here("export", tmp_path / "model.gguf", "-o", tmp_path / "bundle", "--parity", "none")
    verify_files(tmp_path / "bundle")
    assert "no model 'smollm3'" in refused("export", "smollm3", "-o", tmp_path / "none")
