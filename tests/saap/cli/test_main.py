"""The command line as a person meets it."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support.command_line import every_command, here, refused, saap

from saap.base.wording import installing
from saap.cli import main as cli

ROOT = Path(__file__).resolve().parents[3]


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


REFUSED_AT_ONCE = {
    "prune m -o o --ratio 2": "--ratio 2.0 is not allowed",
    "run m -o o --ratio 2": "--ratio 2.0 is not allowed",
    "run no-such-model -o o": "no model 'no-such-model'",
    "tune m -o o --tokens 1": "--tokens 1 is less than a step needs, 1024",
    "eval m --seed 3": "--seed is for --tasks",
    "export m -o o --type Q4_0": "--type is for --target gguf",
}
AT_ONCE = """
import json, sys
from support.command_line import here
answers = [here(*line.split(), code=2).stderr for line in json.loads(sys.argv[1])]
print(json.dumps([answers, sorted({"torch", "transformers"} & sys.modules.keys())]))
"""


def test_what_is_wrong_whatever_the_model_is_refused_before_torch_is_loaded(tmp_path):
    (tmp_path / "m").mkdir()
    command = [sys.executable, "-c", AT_ONCE, json.dumps([*REFUSED_AT_ONCE])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    answers, loaded = json.loads(done.stdout)
    for line, answer, message in zip(REFUSED_AT_ONCE, answers, REFUSED_AT_ONCE.values(), strict=True):
        assert answer.startswith(f"saap: {message}") and answer.count("\n") == 1, line
    assert loaded == []


@pytest.mark.parametrize(("words", "command"), [pytest.param(*c, id="-".join(c[0]) or "saap") for c in every_command()])
def test_a_mistake_in_the_words_of_a_command_is_one_line_that_says_where_help_is(words, command):
    """An option that does not exist, one that takes no value, one without its value, and what is missing."""
    see = f"; see {' '.join(('saap', *words))} --help\n"
    mistakes = [["--no-such-option"], ["--help=3"]]
    if isinstance(command, click.Group):
        mistakes += [["nonsense"]]
    else:
        mistakes += [[part.opts[-1]] for part in command.params if "out" in part.name or part.name == "set_"]
        mistakes += [[]] if any(part.required for part in command.params) else [["a"]]
    for wrong in mistakes:
        told = here(*words, *wrong, code=2)
        assert told.stderr.startswith("saap: ") and told.stderr.endswith(see), wrong
        assert len(told.stderr.splitlines()) == 1 and told.stdout == "", wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prune --raito 0.2", "saap: no such option '--raito' (did you mean --ratio"),
        ("prune d", "saap: missing option '-o' / '--out'; see saap prune --help"),
        ("prune d -o", "saap: option '-o' requires an argument; see"),
        ("devices chek", "saap: no such command 'chek': give list, show, probe, check, "),
        ("report -o page", "saap: give result files, the directory of a run, or --history FOLDER; see saap report"),
        ("cache --clear=3", "saap: invalid value for '--clear': '3' is not one of 'all', 'scores', "),
    ],
)
def test_what_is_wrong_with_the_words_is_said_with_what_is_allowed(words, message):
    assert here(*words.split(), code=2).stderr.startswith(message)


@pytest.mark.parametrize("words", [(), ("devices",)])
def test_a_group_alone_shows_its_help(words):
    assert "Commands:" in here(*words, code=2).stderr


def test_help_is_one_screen_and_shows_an_example(monkeypatch):
    """At most 45 lines of at most 100 columns, for every command."""
    monkeypatch.setenv("COLUMNS", "100")
    context, names = click.Context(cli.cli), []
    for name in cli.cli.list_commands(context):
        command = cli.cli.get_command(context, name)
        group = isinstance(command, click.Group)
        names += [[name], *([name, below] for below in (command.list_commands(context) if group else ()))]
    assert len(names) > 15
    for words in names:
        shown = here(*words, "--help").stdout
        lines = shown.splitlines()
        assert len(lines) <= 45 and max(map(len, lines)) <= 100, (words, len(lines), max(lines, key=len))
        if words != ["devices"]:
            assert f"saap {' '.join(words)}" in shown.split("Example:")[1], words


def test_devices():
    assert "raspberry-pi-5" in here("devices", "list").stdout
    shown = here("devices", "show", "raspberry-pi-5").stdout
    assert "B/s" in shown and "vendor" in shown
    probed = json.loads(here("devices", "probe", "--json").stdout)
    assert len(probed["fingerprint"]) == 16
    assert "toaster" in refused("devices", "show", "toaster")


def test_bad_models(tmp_path, tiny_model):
    out = tmp_path / "out"
    assert "no model 'nonsense'" in refused("prune", "nonsense", "-o", out, "--ratio", "0.2")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("prune", tmp_path / "empty", "-o", out, "--ratio", "0.2")
    text = ["--calibration", tmp_path / "no.txt"]
    assert "no text" in refused("prune", tiny_model(), "-o", out, "--ratio", "0.2", *text)
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


def test_a_missing_package_names_the_extra(tmp_path, tiny_model):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    message = refused(
        "prune", tiny_model(), "-o", tmp_path / "out", "--ratio", "0.2", call=saap, env={"PYTHONPATH": str(tmp_path)}
    )
    assert f"pip install {installing('prune')}" in message


STARTS = {"saap": [Path(sys.executable).parent / "saap"], "python -m saap": [sys.executable, "-m", "saap"]}


@pytest.fixture
def project(tmp_path):
    """A project with modules of our packages' names, and of a library's."""
    for name in ("bench/__init__.py", "devices/__init__.py", "export.py", "torch.py", "msgspec.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("print('not saap')")
    return tmp_path


def started(start, project, *words, **env):
    return subprocess.run(
        [*STARTS[start], *words], capture_output=True, text=True, check=False, cwd=project, env={**os.environ, **env}
    )


@pytest.mark.parametrize("start", STARTS)
def test_modules_of_a_project_are_not_taken_for_ours(start, project):
    (project / "msgspec.py").unlink()  # which PYTHONPATH would put before the library, as it does for every program
    for env in ({}, {"PYTHONPATH": str(project)}):
        done = started(start, project, "devices", "list", **env)
        assert (
            (done.returncode, done.stderr) == (0, "") and "not saap" not in done.stdout and "Raspberry" in done.stdout
        )


def test_started_as_a_module_it_takes_no_library_from_the_working_directory(project):
    assert started("python -m saap", project, "devices", "list").returncode == 0


def test_a_package_that_was_loaded_in_place_of_ours_is_refused(project):
    (project / "sitecustomize.py").write_text("import bench")
    done = started("saap", project, "--version", PYTHONPATH=str(project))
    place = project / "bench/__init__.py"
    assert done.returncode == 2 and f"the package 'bench' is {place}, not the one of saap in {ROOT}" in done.stderr


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
    from export.bundle import Bundle
    from export.gguf.write import export_gguf

    export_gguf(tiny_model(vocab_size=320), tmp_path / "model.gguf", kind="F32")
    here("export", tmp_path / "model.gguf", "-o", tmp_path / "bundle", "--parity", "none")
    Bundle.open(tmp_path / "bundle").check()
    assert "no model 'smollm3'" in refused("export", "smollm3", "-o", tmp_path / "none")


COMPLETED = [
    ("saap dev", ["plain,devices"]),
    ("saap devices show raspberry-pi-", ["plain,raspberry-pi-4", "plain,raspberry-pi-5"]),
    ("saap devices check bundle --device rk", ["plain,rk3588"]),
    ("saap run model --for jetson-x", ["plain,jetson-xavier-nx"]),
    ("saap prune smol", ["file,smol", "plain,smollm2-135m"]),
    ("saap export gemma", ["file,gemma", "plain,gemma3-270m"]),
    ("saap eval smollm2-135m smol", ["file,smol", "plain,smollm2-135m"]),
    ("saap prune model --effort n", ["plain,normal"]),
    ("saap prune model --method fl", ["plain,flap"]),
    ("saap devices probe --wheels fold", ["file,fold"]),
]


@pytest.mark.parametrize(("typed", "offers"), COMPLETED)
def test_a_shell_completes_devices_models_and_choices(typed, offers):
    words = {"_SAAP_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert saap(env=words).stdout.split() == offers


def test_the_line_that_switches_completion_on_works():
    (line,) = re.findall(r"^eval .*_SAAP_COMPLETE.*$", (ROOT / "docs/install.md").read_text(), re.MULTILINE)
    program = f"saap() {{ '{sys.executable}' -m saap.cli \"$@\"; }}; {line}; complete -p saap"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert "_saap_completion" in done.stdout, done.stderr
