"""Where outputs go: never over an input, through devices and pipes as they are, and before anything is shown."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
from support.command_line import here
from support.old_products import old_products

OLD = old_products()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Links to old products, and a text; what a command would write over is in ``state``."""
    for name in ("slim", "bundle", "dense"):
        (tmp_path / name).mkdir()
        for file in (OLD / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    for name in ("result.json", "quality.json", "cost.json", "judge.txt"):
        (tmp_path / name).write_bytes((OLD / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(place):
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "command",
    [
        "prune slim -o slim --ratio 0.1",
        "prune slim -o ./slim/../slim --ratio 0.1",
        "prune slim -o . --ratio 0.1",
        "tune slim -o slim",
        "tune slim -o dense --teacher dense",
        "run slim -o slim --ratio 0.1",
        "export slim -o slim",
        "export slim --target gguf -o slim/config.json",
        "eval slim --text judge.txt --json judge.txt",
        "eval slim --text judge.txt --json slim",
        "compare result.json result.json --json result.json",
        "compare quality.json quality.json --junit quality.json",
        "bench bundle --json bundle",
        "bench bundle --history result.json",
        "report result.json -o result.json",
        "report result.json -o bundle",
        "devices costs slim -o slim",
    ],
)
def test_an_output_that_is_an_input_is_refused(place, command):
    before = state(place)
    for words in (command, f"{command} --force"):
        told = here(*words.split(), code=2).stderr
        assert told.startswith("saap: ") and len(told.splitlines()) == 1, told
        assert state(place) == before


FILES = {  # commands that write a file, its name last
    "export slim --target gguf -o": "a GGUF file of saap",
    "eval bundle --text judge.txt --max-chunks 1 --chunk 64 --json": "a document of `saap eval`",
    "bench bundle --json": "a result of `saap bench`",
    "compare result.json result.json --json": "a comparison of speeds",
    "compare result.json result.json --junit": "a JUnit file of saap",
    "compare quality.json quality.json --json": "a comparison of qualities",
    "report result.json -o": "a page of `saap report`",
    "devices costs slim -o": "a table of `saap devices costs`",
    "devices test bundle --junit": "a JUnit file of saap",
    "devices emulate bundle --json": "a document of `saap devices emulate`",
}
FOREIGN = {
    "theirs.json": '{"name": "my package", "version": "1.0.0", "kind": "theirs", "rows": []}',
    "theirs.html": "<!DOCTYPE html><title>my page</title>",
    "theirs.xml": '<testsuites><testsuite name="pytest"/></testsuites>',
    "theirs.gguf": "GGUF\3\0\0\0",
    "theirs.txt": "years of work",
    "broken.json": '{"schema": 2, "measurements": [',
}


@pytest.mark.parametrize("command", FILES)
def test_a_file_that_saap_did_not_write_or_of_another_kind_is_refused(place, command):
    for name, text in FOREIGN.items():
        Path(name).write_text(text)
    Path("link").symlink_to("theirs.txt")
    before = state(place)
    ours = {"result.json": "bench", "quality.json": "eval", "cost.json": "costs"}
    others = [name for name, writer in ours.items() if name not in command and f"{writer}`" not in FILES[command]]
    for name in (*FOREIGN, "link", *others):
        told = here(*command.split(), name, code=2).stderr
        why = f"{name} is not {FILES[command]}, and is not written over: give another name, or --force"
        assert why in told
        assert len(told.splitlines()) == 1 and state(place) == before
    for name, why in (("slim", "is a directory"), ("result.json/x", "cannot be written"), ("", "is empty")):
        assert why in here(*command.split(), name, code=2).stderr
    assert state(place) == before


def test_a_file_of_ours_is_replaced_as_is_an_empty_one_and_by_force_any(place):
    commands = [command for command in FILES if command.split()[0] in ("export", "eval", "compare", "report")]
    for command in commands:
        Path("out").write_text("")
        Path("other").write_text("theirs")
        here(*command.split(), "out")
        made = Path("out").read_bytes()
        here(*command.split(), "out")
        here(*command.split(), "other", "--force")
        assert made and len(Path("other").read_bytes()) == len(Path("out").read_bytes()), command
    assert not list(place.glob(".*"))


DIRECTORIES = {  # commands that write a directory, its name last, and a directory of ours that is of another kind
    "prune slim --ratio 0.1 -o": "bundle",
    "tune slim -o": "bundle",
    "export dense -o": "slim",
    "run dense -o": "slim",
}


@pytest.mark.parametrize("command", DIRECTORIES)
def test_a_directory_of_another_kind_or_with_files_of_others_is_refused(place, command):
    theirs = {"empty-record": "saap.json", "foreign-record": "bundle.json", "thesis": "thesis.txt", "run": "run.json"}
    for folder, name in theirs.items():
        Path(folder).mkdir()
        Path(folder, name).write_text("{}")
    for folder in ("slim", "bundle"):
        Path(f"{folder}-notes").mkdir()
        for file in Path(folder).iterdir():
            (Path(f"{folder}-notes") / file.name).write_bytes(file.read_bytes())
        Path(f"{folder}-notes", "notes.txt").write_text("mine")
    Path("link").symlink_to("thesis")
    os.mkfifo("pipe")
    before = state(place)
    for name in (*theirs, "slim-notes", "bundle-notes", "link", DIRECTORIES[command], "judge.txt", "pipe"):
        told = here(*command.split(), name, code=2).stderr
        assert len(told.splitlines()) == 1 and name in told and ("holds" in told or "is a file" in told), told
        assert state(place) == before and Path("link").is_symlink()
    for name, why in (("judge.txt/x", "cannot be written (Not a directory)"), ("", "is empty")):
        assert why in here(*command.split(), name, code=2).stderr
    if not command.startswith("run"):
        Path("here").mkdir()
        os.chdir("here")
        told = here(
            *(str(place / word) if word in ("slim", "dense") else word for word in command.split()), ".", code=2
        )
        assert "holds, the working directory" in told.stderr


def test_a_link_is_replaced_and_what_it_names_stays(place):
    """Also where that is an output of ours; a link to nothing counts as nothing."""
    Path("real").mkdir()
    for file in Path("bundle").iterdir():
        (Path("real") / file.name).write_bytes(file.read_bytes())
    before = {name: digest for name, digest in state(place).items() if name.startswith("real")}
    Path("link").symlink_to("real")
    Path("nothing").symlink_to("nowhere")
    for name in ("link", "nothing"):
        here("export", "slim", "--parity", "none", "-o", name)
        assert not Path(name).is_symlink() and Path(name, "bundle.json").is_file()
    assert {name: digest for name, digest in state(place).items() if name.startswith("real")} == before
    assert not [*place.glob(".*"), *place.glob("nowhere")]


def test_by_force_a_directory_takes_the_place_of_files_of_others(place):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    here("export", "slim", "--parity", "none", "-o", "mine", "--force")
    assert Path("mine/bundle.json").is_file() and not Path("mine/thesis.txt").exists()


def test_folders_of_histories_and_baselines(place):
    Path("theirs").mkdir()
    Path("theirs/package.json").write_text("{}")
    Path("kept").mkdir()
    (Path("kept") / "bundle.0123456789abcdef.json").write_text("{}")
    before = state(place)
    told = here("bench", "bundle", "--history", "theirs", code=2).stderr
    assert "theirs holds other files, and not a result of `saap bench`: give another --history, or --force" in told
    assert "--history takes a folder" in here("bench", "bundle", "--history", "judge.txt", code=2).stderr
    assert "cannot be written" in here("bench", "bundle", "--history", "judge.txt/x", code=2).stderr
    told = here("devices", "baseline", "bundle", "--baselines", "kept", code=2).stderr
    assert "kept holds other files, and not a recorded baseline: give another --baselines, or --force" in told
    (Path("kept") / "other.0123456789abcdef.json").write_bytes(next((OLD / "baselines").iterdir()).read_bytes())
    told = here("devices", "baseline", "bundle", "--baselines", "kept", code=2).stderr
    assert "is not a recorded baseline, and is not written over" in told
    (Path("kept") / "other.0123456789abcdef.json").unlink()
    for words in (
        "bench bundle --history bundle",
        "bench bundle --json bundle/new.json",
        "eval bundle --json bundle/x",
    ):
        assert "would lie in a bundle, which holds only" in here(*words.split(), "--force", code=2).stderr
    told = here("devices", "baseline", "bundle", "--baselines", "bundle", "--force", code=2).stderr
    assert "bundle would lie in a bundle" in told
    assert state(place) == before


def test_devices_and_pipes_are_written_to_as_they_are(place):
    os.mkfifo("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()))
    reader.start()
    here("compare", "quality.json", "quality.json", "--json", "pipe")
    reader.join(10)
    assert json.loads(read[0]) and Path("pipe").is_fifo()
    here("report", "result.json", "-o", "/dev/null")
    assert Path("/dev/null").is_char_device()
    told = here("report", "result.json", "-o", "/dev/full", code=2).stderr
    assert told == "saap: /dev/full: No space left on device: make room there, or write elsewhere\n"
    assert Path("/dev/full").is_char_device()
    for command in ("export slim --target gguf -o", "export slim -o", "prune slim --ratio 0.1 -o"):
        assert "file" in here(*command.split(), "/dev/null", code=2).stderr
    assert Path("/dev/null").is_char_device()


def test_standard_output_by_its_name_is_written_to_where_it_is(place, capfd):
    """A shell's > makes a file of it, which must neither be begun anew nor replaced."""
    with Path("said").open("w") as said:
        said.write("before\n")
        said.flush()
        before = os.dup(1)
        os.dup2(said.fileno(), 1)
        try:
            here("compare", "quality.json", "quality.json", "--json", "/dev/stdout")
        finally:
            os.dup2(before, 1)
            os.close(before)
    first, document = Path("said").read_text().split("\n", 1)
    assert first == "before" and json.loads(document)["kind"] == "saap-quality-comparison"
    assert Path("/dev/stdout").is_symlink()
    told = here("compare", "quality.json", "quality.json", "--json", "/dev/fd/77", code=2).stderr
    assert told == "saap: /dev/fd/77 is closed: give another place\n"
