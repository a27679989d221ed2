"""An interrupt while a library computes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_graphs import endless_graph

START = """
import os, signal, sys, time
from saap.base.interrupt import ask_to_end, end_in_time
from saap.cli.main import cut
signal.signal(signal.SIGINT, ask_to_end)
end_in_time(cut)
"""
IN_A_SESSION = """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
print("runs", flush=True)
session.run(None, {})
"""
HANDLED = """
print("runs", flush=True)
try:
    time.sleep(30)
except KeyboardInterrupt:
    time.sleep(2.5)  # what is cleaned up may take its time
    print("clean", flush=True)
"""


@pytest.mark.parametrize(
    ("code", "status", "out", "err"),
    [(IN_A_SESSION, 130, b"", b"saap: interrupted; run the same command again\n"), (HANDLED, 0, b"clean\n", b"")],
)
def test_an_interrupt_ends_what_computes_and_leaves_time_to_what_cleans_up(
    tmp_path: Path, code: str, status: int, out: bytes, err: bytes
) -> None:
    command = [sys.executable, "-c", START + code, str(endless_graph(tmp_path / "model.onnx"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"runs\n"
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        begun = time.monotonic()
        assert process.communicate(timeout=20) == (out, err) and process.returncode == status
        assert out or time.monotonic() - begun < 10  # two seconds, and what a loaded machine adds
