"""A board's installation: `.[bench]` alone, in a fresh environment, on the oldest Python and ONNX Runtime we claim."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """Path of `saap` in a venv with only the bench extra and onnxruntime 1.23.2, the newest for Python 3.10."""
    python = shutil.which("python3.10")
    if python is None or subprocess.run([python, "-c", "import venv"], check=False).returncode:
        python = sys.executable  # onnxruntime 1.23.2 exists for later Pythons as well
    venv = tmp_path_factory.mktemp("board") / "venv"
    subprocess.run([python, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin/python"), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, f"{ROOT}[bench]", "onnxruntime==1.23.2"], check=True)
    done = subprocess.run([str(venv / "bin/python"), "-c", "import torch"], capture_output=True, check=False)
    assert done.returncode != 0, "torch must not be there"
    return venv / "bin/saap"


def run(board, *arguments, code=0):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(board), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=board.parent,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_generate_bench_report_work_and_prune_names_its_extra(board, real_model, tmp_path):
    from support.exported import export_bundle

    export_bundle(real_model, tmp_path / "bundle")
    answer = run(board, "generate", tmp_path / "bundle", "What is the capital of France?", "--max-tokens", "12")
    assert "Paris" in answer.stdout
    run(board, "bench", tmp_path / "bundle", "-r", "2", "-t", "1", "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["versions"]["onnxruntime"] == "1.23.2"
    assert len(result["measurements"][0]["samples"]) == 2
    run(board, "report", tmp_path / "result.json", "-o", tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()
    refused = run(board, "prune", real_model, "-o", tmp_path / "slim", "--ratio", "0.2", code=2)
    assert "pip install 'saap[prune] @ file://" in refused.stderr and "Traceback" not in refused.stderr
