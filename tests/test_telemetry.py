"""Nothing leaves the device: no connection, and no file but the outputs and our cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# One process for all commands.
PROGRAM = """
import os
from click.testing import CliRunner
from saap.cli.main import cli

os.chdir({place!r})
for words in {commands}:
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, (words, done.output)
"""


def test_libraries_are_told_before_they_are_loaded():
    script = "import bench.runtimes.session, os, sys; assert 'onnxruntime' not in sys.modules; print(dict(os.environ))"
    for given, told in ((None, "1"), ("1", None)):
        env = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "SAAP_TELEMETRY")}
        env |= {} if given is None else {"SAAP_TELEMETRY": given}
        done = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, check=True)
        found = re.search(rb"'ORT_DISABLE_TELEMETRY': '(\d)'", done.stdout)
        assert (found and found[1].decode()) == told


def test_commands_write_their_outputs_and_call_nobody(tmp_path, tiny_model):
    """Each command in a home of its own, in a namespace without network, where a call of anybody would be seen."""
    isolated = ["unshare", "--net", "strace", "-f", "--seccomp-bpf", "-e", "trace=connect", "-o", tmp_path / "calls"]
    if subprocess.run(["unshare", "--net", "strace", "-V"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace here (root), or no strace")
    model = tiny_model(max_position_embeddings=512)
    home, place = tmp_path / "home", tmp_path / "place"
    home.mkdir()
    place.mkdir()
    for name, words in (("learn", "The cat sat on mat {} by day."), ("judge", "No dog ran home {} at night.")):
        (place / f"{name}.txt").write_text("\n".join(words.format(n) for n in range(3000)))
    few = ["--sequences", "8", "--length", "32"]
    one = ["-p", "8", "-n", "8", "-t", "1", "-r", "1", "--no-cold"]
    commands = [
        ["prune", str(model), "-o", "slim", "--ratio", "0.2", "--calibration", "learn.txt", *few],
        ["tune", "slim", "-o", "tuned", "--teacher", str(model), "--data", "learn.txt", "--tokens", "4096"],
        ["eval", "tuned", "--reference", str(model), "--text", "judge.txt", "--chunk", "32", "--json", "quality.json"],
        ["export", "tuned", "-o", "bundle", "--text", "learn.txt"],
        ["generate", "bundle", "The cat", "--raw", "--max-tokens", "4"],
        ["bench", "bundle", *one, "--json", "result.json"],
        ["compare", "quality.json", "quality.json"],
        ["report", "result.json", "quality.json", "-o", "page.html"],
        ["devices", "probe"],
        ["devices", "check", "bundle"],
    ]
    env = {k: v for k, v in os.environ.items() if not re.match("ORT_|HF_|XDG_|SAAP_|DO_NOT", k)} | {"HOME": str(home)}
    done = subprocess.run(
        [*isolated, sys.executable, "-c", PROGRAM.format(place=str(place), commands=commands)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in (tmp_path / "calls").read_text().splitlines() if "AF_INET" in line] == []
    found = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(".cache/saap/")} == set()
    assert {path.name for path in place.iterdir()} == {
        "learn.txt", "judge.txt", "slim", "tuned", "bundle", "quality.json", "result.json", "page.html"
    }  # fmt: skip
