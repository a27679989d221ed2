"""Outputs are whole or not there: other processes, kills between two renames, full and read-only disks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.command_line import here, last_line, refused
from support.slim_integers import WIDE

from saap.base.errors import UserError
from saap.base.writing import beside, claimed, put_in_place, taking_turns, writing_directory, writing_file
from saap.prune.options import PruneOptions
from saap.prune.pruning import prune

IDS = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(3))
RESULT = Path(__file__).parents[2] / "support/old/760273a/result.json"
HOLDER = (
    "import sys; from saap.base.writing import claimed\nwith claimed(sys.argv[1]): print('held', flush=True); input()"
)


@pytest.fixture
def holder(tmp_path, monkeypatch) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing tmp_path/out."""
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_measures_on_a_host_takes_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    code = (
        "from saap.base.writing import taking_turns\nwith taking_turns(None): print('held', flush=True); input()"
        "\nprint('done', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdin and other.stdout.readline() == "held\n"

        class Shown:
            """A progress that lets the other go on when it is told that this one waits."""

            def __init__(self):
                self.notes = []

            def __call__(self, *_):
                pass

            def note(self, text):
                self.notes.append(text)
                other.stdin.write("\n")
                other.stdin.flush()

        shown = Shown()
        with taking_turns(shown):
            assert other.stdout.readline() == "done\n"
        assert shown.notes == ["waiting for another measurement of saap on this host"]
    with taking_turns(shown):
        pass


def test_another_process_on_the_same_output_is_refused_and_a_killed_one_forgotten(holder, tmp_path):
    def refusal(out: Path) -> Callable[[], object]:
        return pytest.raises(UserError, match=r"another process of saap is writing .*out: wait until it has ended, or")

    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path / "out", tmp_path / "link/out"):
        with refusal(out), claimed(out):
            pass
        with refusal(out), writing_directory(out):
            pass
        with refusal(out), writing_file(out):
            pass
    assert not (tmp_path / "out").exists()
    with writing_directory(tmp_path / "other"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claimed(tmp_path / "out"), writing_directory(tmp_path / "out") as partial:  # claimed twice by one process
        (partial / "a").write_text("a")
    assert (tmp_path / "out/a").read_text() == "a"


def test_commands_refuse_an_output_that_another_process_writes(holder, tiny_model, tmp_path, monkeypatch):
    path = tiny_model(**WIDE)
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    few = ("--sequences", 4, "--length", 16)
    for command in (
        ("prune", path, "--ratio", 0.3, "--calibration", text, *few),
        ("tune", path, "--data", text, "--tokens", 512, "--length", 32),
        ("export", path, "--parity", "none"),
        ("run", path, "--ratio", 0.3),
    ):
        assert "another process of saap is writing" in refused(*command, "-o", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    out, gone = tmp_path / "out", 2**22 - 1  # no process has that id
    (tmp_path / f".out.old-{gone}").mkdir()
    (tmp_path / f".out.old-{gone}/a").write_text("old")
    with beside(out, "partial"):
        assert (out / "a").read_text() == "old"
    (tmp_path / f".out.old-{gone}").mkdir()
    (tmp_path / f".out.partial-{gone}").mkdir()
    with writing_directory(tmp_path / "new"):
        pass
    with beside(out, "partial") as partial:
        (partial / "a").write_text("new")
        put_in_place(partial, out)
    assert (out / "a").read_text() == "new" and {path.name for path in tmp_path.iterdir()} == {"new", "out"}


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("old")
    with pytest.raises(OSError):
        put_in_place(tmp_path / "not there", tmp_path / "out")
    assert (tmp_path / "out/a").read_text() == "old"


def test_no_lock_stays_and_two_processes_never_hold_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def contend() -> int:
        """1 when another process had the output as well."""
        had = 0
        while had < 40:
            with suppress(UserError), claimed("out"):
                try:
                    Path("mark").mkdir()
                except FileExistsError:
                    return 1
                Path("mark").rmdir()
                had += 1
        return 0

    children = []
    for _ in range(4):
        if not (child := os.fork()):
            code = 1
            try:
                code = contend()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert not list((tmp_path / "cache/locks").iterdir())


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(ValueError), writing_file(tmp_path / "sub/a.gguf") as partial:
        partial.write_text("half")
        raise ValueError
    (tmp_path / f"sub/.a.gguf.partial-{2**22 - 1}").write_text("of a killed process")
    assert not (tmp_path / "sub/a.gguf").exists()
    with writing_file(tmp_path / "sub/a.gguf") as partial:
        partial.write_text("whole")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.gguf"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)  # the library of GGUF keeps its file open


def fill(disk: Path, left: int) -> None:
    """Take what is free but for some bytes."""
    stat = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(max(0, stat.f_bavail * stat.f_bsize - left)))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def commands(tiny_model, tmp_path) -> dict[str, tuple[object, ...]]:
    """Commands without their output, the name of which comes last; quick ones on a tiny model."""
    path = tiny_model(**WIDE)
    prune(path, PruneOptions(ratio=0.3), output=tmp_path / "slim", calibration=IDS)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return {
        "slim": ("prune", path, "--ratio", 0.3, "--calibration", text, "--sequences", 4, "--length", 16, "-o"),
        "tuned": ("tune", tmp_path / "slim", "--data", text, "--tokens", 64, "--length", 16, "-o"),
        "bundle": ("export", path, "--parity", "none", "-o"),
        "portable": ("export", path, "--parity", "none", "--target", "portable", "--bits", 4, "-o"),
        "model.gguf": ("export", path, "--target", "gguf", "-o"),
        "eval.json": ("eval", path, "--text", text, "--chunk", 16, "--max-chunks", 4, "--json"),
        "report.html": ("report", RESULT, "-o"),
    }


def is_told(message: str, disk: Path) -> None:
    """One line that says what is wrong, where, and what to do."""
    assert "No space left on device" in message or "are free" in message or "Read-only file system" in message, message
    assert str(disk) in message or "are free" in message, message


def test_a_full_disk_is_one_line_as_is_a_read_only_one_and_leaves_the_old_output(small_disk, commands, monkeypatch):
    for module in ("saap.prune.pruning", "export.write"):  # else the sums refuse it before anything is written
        monkeypatch.setattr(f"{module}.check_disk", lambda *a: None, raising=False)
    for name, command in commands.items():
        here(*command, small_disk / name)
        before = contents(small_disk)
        for left in (0, 65_536):
            fill(small_disk, left)
            message = here_or_refused(*command, small_disk / name)
            (small_disk / "filler").unlink()
            if message is None:  # it fitted
                continue
            is_told(message, small_disk)
            shutil.rmtree(small_disk / ".tuned.tuning", ignore_errors=True)  # a training goes on from there
            assert contents(small_disk) == before, (name, left)
        for path in small_disk.iterdir():
            subprocess.run(["rm", "-rf", path], check=True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for name, command in commands.items():
        is_told(refused(*command, small_disk / name), small_disk)


def here_or_refused(*arguments: object) -> str | None:
    """What a command says that fails; None of one that ends well."""
    done = here(*arguments, code=None)
    assert done.code in (0, 2), done.stderr
    return None if done.code == 0 else str(last_line(done))


@pytest.mark.parametrize("kind", ["directory", "file", "place"])
def test_a_message_names_what_the_user_named_and_no_temporary_place(tmp_path, kind):
    out = tmp_path / "out"
    make = {"directory": writing_directory, "file": writing_file, "place": lambda out: beside(out, "integers")}[kind]
    with pytest.raises(UserError, match=rf"^{out} cannot be read$"), make(out) as partial:
        raise UserError(f"{partial} cannot be read")
    with pytest.raises(OSError) as caught, make(out) as partial:
        raise OSError(errno.EACCES, "no", str(partial / "model.onnx"))
    assert caught.value.filename == str(out / "model.onnx")
