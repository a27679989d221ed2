"""Programs in two real processes that meet over gloo, started by ``accelerate launch``."""

import os
import socket
import subprocess
import sys
from pathlib import Path

DATA_PARALLEL, SHARDED = ["--multi_gpu"], ["--use_fsdp", "--fsdp_version", "2"]


def launch(how, *program):
    """A program in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
        *map(str, program),
    ]  # fmt: skip
    path = os.pathsep.join([*map(str, Path(__file__).resolve().parents[1:3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
