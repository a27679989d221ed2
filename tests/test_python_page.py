"""docs/python.md: its program runs as printed, prints what it prints, and has no type that is not said."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs/python.md").read_text(encoding="utf-8")
((PROGRAM),) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_program_runs_as_printed(tmp_path, tiny_model, data_dir):
    model = tiny_model(max_position_embeddings=512)
    program = PROGRAM.replace('"smollm2-135m"', repr(str(model)))
    assert program != PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path,
        stdin=subprocess.DEVNULL, env=os.environ | {"SAAP_DATA": str(data_dir)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    removed, reference, slim, tuned, dense, small, *answer = done.stdout.splitlines()
    assert re.fullmatch(r"(2\d|30)% of the layers' weights removed", removed)
    assert reference == f"{model}: KL 0.0"
    assert [re.sub(r"\d+\.\d+$", "X", row) for row in (slim, tuned)] == [
        "out/python/slim: KL X",
        "out/python/tuned: KL X",
    ]
    assert dense.startswith("dense-int4: ") and small.startswith("slim-int4: ")
    assert answer and all((tmp_path / "out/python" / name).is_dir() for name in ("slim", "tuned", "slim-int4"))


def test_the_program_is_typed(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    libraries = "torch transformers onnx onnx_ir onnxruntime numpy scipy tokenizers accelerate rich matplotlib gguf"
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in libraries.split())
    (tmp_path / "mypy.ini").write_text("[mypy]\n" + skipped)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache"),
         "--ignore-missing-imports", "program.py"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
